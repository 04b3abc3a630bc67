//! The command line beside `serve`: one file for calls to a server, one that follows what plugins say, one for making
//! plugins, one that runs a plugin without a server.
//!
//! Everything prints for people, and with `--json` what programs read. The address and the token come from options or
//! from `TIDEGATE_URL` and `TIDEGATE_TOKEN` (or `TIDEGATE_TOKEN_FILE`).

mod craft;
mod exec;
mod logs;
mod remote;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};

/// Which server, and who asks.
#[derive(Args, Clone)]
pub struct Server {
    /// The server's address.
    #[arg(long, env = "TIDEGATE_URL", value_name = "URL", default_value = "http://127.0.0.1:8433")]
    url: String,
    /// The token of who asks [env: TIDEGATE_TOKEN].
    #[arg(long, value_name = "TOKEN")]
    token: Option<String>,
    /// A file with the token, such as `admin-token` in the data directory [env: TIDEGATE_TOKEN_FILE].
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The namespace [default: main].
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// Print what the server says, as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub struct Sql {
    /// One statement or several; `-` reads them from stdin.
    statement: String,
    /// Parameters of the statement, a JSON array.
    #[arg(long, value_name = "JSON", default_value = "[]")]
    params: String,
    #[command(flatten)]
    server: Server,
}

#[derive(Args)]
pub struct LiveQuery {
    /// The SELECT.
    statement: String,
    /// A stage of the pipeline, `name`, `name@3` or `name:{"minutes":30}`; may be given several times.
    #[arg(long, value_name = "STAGE")]
    plugin: Vec<String>,
    /// What happens to a row that a plugin fails on.
    #[arg(long, value_name = "MODE", value_parser = ["stop", "skip", "pass"])]
    on_error: Option<String>,
    /// End when the present rows have been told; a plugin that fails on them is an error.
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    server: Server,
}

#[derive(Subcommand)]
pub enum Plugin {
    /// Makes a crate with a plugin and its tests.
    New {
        /// The name; also the folder's.
        name: String,
        /// What it sees, rows or changes, and what it does with them.
        #[arg(long, value_name = "KIND", default_value = "filter",
              value_parser = ["filter", "transform", "change-filter", "change-transform"])]
        kind: String,
        /// The folder of guest-sdk [default: the one this program was built beside].
        #[arg(long, value_name = "DIR")]
        sdk: Option<PathBuf>,
    },
    /// Compiles a plugin's crate to WebAssembly; the module is put into its folder.
    Build {
        /// The crate's.
        #[arg(default_value = ".")]
        folder: PathBuf,
        /// Print where the module is and its size, as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Runs a plugin's tests; they find this program for the real engine.
    Test {
        /// The crate's.
        #[arg(default_value = ".")]
        folder: PathBuf,
    },
    /// Uploads a module (.wasm, .wat, or a crate's folder, which is built first), makes it active and says what it costs.
    Push {
        /// The module, or the crate's folder.
        #[arg(default_value = ".")]
        module: PathBuf,
        /// The plugin's name [default: that of the file or crate].
        #[arg(long)]
        name: Option<String>,
        /// The table whose columns the rows have on which its time is measured [default: the columns that it reads].
        #[arg(long)]
        table: Option<String>,
        /// The parameters it is measured with.
        #[arg(long, value_name = "JSON", default_value = "{}")]
        params: String,
        #[command(flatten)]
        server: Server,
    },
    /// Runs rows through a plugin of the server; nothing is stored.
    Try {
        /// `name` or `name@3`.
        name: String,
        /// The rows, a JSON array of objects; of changes the rows after.
        #[arg(long, value_name = "JSON", default_value = "[]")]
        rows: String,
        /// The rows before, for plugins that see changes.
        #[arg(long, value_name = "JSON", default_value = "[]")]
        old: String,
        /// Its parameters, a JSON object.
        #[arg(long, value_name = "JSON", default_value = "{}")]
        params: String,
        /// The table whose columns the rows have [default: the columns that the plugin reads].
        #[arg(long)]
        table: Option<String>,
        #[command(flatten)]
        server: Server,
    },
    /// The plugins of the server.
    List {
        #[command(flatten)]
        server: Server,
    },
    /// One plugin: its versions, parameters and columns.
    Show {
        name: String,
        #[command(flatten)]
        server: Server,
    },
    /// What a plugin failed on while its live queries went on.
    Errors {
        name: String,
        #[command(flatten)]
        server: Server,
    },
    /// Runs what a plugin failed on once more, by the versions that are active now; nothing is stored.
    Replay {
        name: String,
        /// Which of `plugin errors`.
        number: u64,
        #[command(flatten)]
        server: Server,
    },
    /// What a plugin said through `log`, as long as the server keeps it in memory.
    Logs {
        name: String,
        /// Go on with what it says from now on.
        #[arg(short, long)]
        follow: bool,
        /// So many of the newest lines first.
        #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 100)]
        lines: usize,
        #[command(flatten)]
        server: Server,
    },
    /// Makes an earlier version's module active again, as a version of its own.
    Rollback {
        name: String,
        /// Which [default: the one before that whose module is active].
        #[arg(long)]
        version: Option<u32>,
        #[command(flatten)]
        server: Server,
    },
    /// Removes a plugin with all its versions.
    Rm {
        name: String,
        #[command(flatten)]
        server: Server,
    },
    /// Puts a manifest (JSON lines) into a module that another language's compiler made.
    Attach {
        /// The module, .wasm or .wat.
        module: PathBuf,
        /// The manifest, as guest-sdk/ABI.md describes it.
        #[arg(long, value_name = "FILE")]
        manifest: PathBuf,
        /// Where to [default: the module itself; of a .wat the .wasm beside it].
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Runs plugins on this machine, without a server: for test kits.
    Exec {
        /// One JSON object a line in, one a line out.
        #[arg(long, required = true)]
        stdio: bool,
    },
}

pub fn sql(args: Sql) -> ExitCode {
    finish(block(remote::sql(args)))
}

pub fn live(args: LiveQuery) -> ExitCode {
    finish(block(remote::live(args)))
}

pub fn plugin(command: Plugin) -> ExitCode {
    finish(match command {
        Plugin::New { name, kind, sdk } => craft::new(&name, &kind, sdk),
        Plugin::Build { folder, json } => craft::build(&folder).map(|built| craft::report(&built, json)),
        Plugin::Test { folder } => craft::test(&folder),
        Plugin::Attach { module, manifest, output } => craft::attach(&module, &manifest, output.as_deref()),
        Plugin::Exec { stdio: _ } => exec::stdio(),
        Plugin::Push { module, name, table, params, server } => {
            block(remote::push(module, name, table, params, server))
        }
        Plugin::Try { name, rows, old, params, table, server } => {
            block(remote::try_rows(name, [rows, old, params], table, server))
        }
        Plugin::List { server } => block(remote::list(server)),
        Plugin::Show { name, server } => block(remote::show(name, server)),
        Plugin::Errors { name, server } => block(remote::errors(name, server)),
        Plugin::Replay { name, number, server } => block(remote::replay(name, number, server)),
        Plugin::Logs { name, follow, lines, server } => block(logs::show(name, follow, lines, server)),
        Plugin::Rollback { name, version, server } => block(remote::rollback(name, version, server)),
        Plugin::Rm { name, server } => block(remote::remove(name, server)),
    })
}

/// Why a command failed, for people; what a server said is passed on as it is.
type Outcome = Result<(), String>;

fn block(work: impl Future<Output = Outcome>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start the runtime: {error}"))?;
    runtime.block_on(work)
}

fn finish(outcome: Outcome) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("tidegate: {message}");
            ExitCode::FAILURE
        }
    }
}
