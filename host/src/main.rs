//! The `tidegate` command: settings, logs, the database, the server.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use host::cli;
use host::config::{Config, Flags, LogFormat};
use host::db::Db;
use host::http::routes::App;
use host::http::{auth, server, sse};
use host::plugins::compiler;
use host::telemetry::{self, Metrics};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// How often the store is asked whether it failed: a lock-free load, so seldom is a matter of taste, not of cost.
const FAILURE_CHECK: Duration = Duration::from_millis(200);

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A WebAssembly-pluggable edge database.
#[derive(Parser)]
#[command(name = "tidegate", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the server.
    Serve(Serve),
    /// Runs SQL on a server.
    Sql(cli::Sql),
    /// Prints a live query's events as they come.
    Live(cli::LiveQuery),
    /// Makes, tests and uploads plugins.
    #[command(subcommand)]
    Plugin(cli::Plugin),
    /// Compiles a module from stdin to stdout: what the server starts for each upload.
    #[command(name = compiler::COMMAND, hide = true)]
    CompileModule { seconds: u64 },
}

#[derive(Args)]
struct Serve {
    /// The settings, a TOML file [default: none; also TIDEGATE_CONFIG].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the data is kept [default: ./data].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Address and port to listen on; port 0 picks a free one [default: 127.0.0.1:8433].
    #[arg(long, value_name = "ADDR", value_parser = address)]
    bind: Option<SocketAddr>,
    /// Allow plain HTTP on an address that other machines can reach.
    #[arg(long)]
    insecure_http: bool,
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "it is an IP address and a port, such as 127.0.0.1:8433".to_owned())
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Serve(args) => serve(args),
        Command::Sql(args) => return cli::sql(args),
        Command::Live(args) => return cli::live(args),
        Command::Plugin(command) => return cli::plugin(command),
        Command::CompileModule { seconds } => return compiler::run(seconds),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("tidegate: {message}");
            ExitCode::FAILURE
        }
    }
}

fn serve(args: Serve) -> Result<(), String> {
    let Serve { config, data_dir, bind, insecure_http } = args;
    let flags = Flags { config, data_dir, bind, insecure_http };
    let mut config = Config::load(&flags, std::env::vars_os()).map_err(|error| error.to_string())?;
    // This program, also when its file was replaced since: a child of another version would compile for another engine.
    config.plugins.compiler = Some(PathBuf::from("/proc/self/exe"));
    telemetry::init(config.log_format == LogFormat::Json, &config.log_filter)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start the runtime: {error}"))?;
    runtime.block_on(run(config))
}

async fn run(config: Config) -> Result<(), String> {
    // Signals are caught from here on, so that one during start-up ends in order as well.
    let shutdown = shutdown()?;
    // Before the database: a busy port is found at once, and without touching anything.
    let listener = bind(config.http.bind).await?;
    let address = listener.local_addr().map_err(|error| format!("the listening socket has no address: {error}"))?;
    let (metrics, exposition) = Metrics::new();
    let db = open(&config, metrics.clone()).await?;
    let admin_token = admin_token(&config)?;
    let app = App::new(db.clone(), &config, &admin_token, metrics, exposition);
    announce(address);
    let ended = async {
        tokio::select! {
            () = shutdown => {}
            () = failed(&db) => {}
        }
    };
    server::run(listener, app, ended).await;
    let store_failed = db.failed();
    // Flushes and joins threads, so it blocks.
    tokio::task::spawn_blocking(move || db.close()).await.map_err(|error| format!("closing failed: {error}"))?;
    tracing::info!("stopped");
    if store_failed {
        // Whether the last commits are on disk is not known: only a start finds out, and a supervisor has to make one.
        return Err("the store failed; the log above says why. Start again to recover what is on disk".to_owned());
    }
    Ok(())
}

/// Resolves when the store took a failed write and acknowledges nothing any more.
async fn failed(db: &Db) {
    let mut look = tokio::time::interval(FAILURE_CHECK);
    while !db.failed() {
        look.tick().await;
    }
}

async fn bind(address: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(address).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => format!(
            "port {} of {} is in use by another program (`ss -ltnp` shows which); stop that one, or choose another with \
             --bind, say --bind {}:0 for any free port",
            address.port(),
            address.ip(),
            address.ip(),
        ),
        _ => format!("cannot listen on {address}: {error}"),
    })
}

/// Opening recovers what a crash left behind, which may take a while and blocks.
async fn open(config: &Config, metrics: Arc<Metrics>) -> Result<Db, String> {
    let dir = config.data_dir.clone();
    std::fs::create_dir_all(&dir)
        .map_err(|error| format!("cannot make the data directory {}: {error}", dir.display()))?;
    let config = config.clone();
    let opened = tokio::task::spawn_blocking(move || Db::open(&config, Arc::new(sse::Events), metrics)).await;
    match opened {
        Ok(opened) => opened.map_err(|error| error.to_string()),
        Err(panicked) => Err(format!("opening the database failed: {panicked}")),
    }
}

fn admin_token(config: &Config) -> Result<String, String> {
    if let Some(token) = &config.admin_token {
        return Ok(token.clone());
    }
    let stored = auth::stored_admin_token(&config.data_dir)
        .map_err(|error| format!("the admin token in {}: {error}", config.data_dir.join("admin-token").display()))?;
    if stored.new {
        eprintln!("tidegate: made an admin token; it is in {}, for you alone to read", stored.path.display());
    }
    Ok(stored.token)
}

/// On stdout, for scripts: they wait for this line, and read the port that was picked.
fn announce(address: SocketAddr) {
    println!("listening on http://{address}");
    // Not line-buffered when it is a pipe; and somebody may have closed it, which is no reason to stop.
    let _ = std::io::stdout().flush();
    tracing::info!(%address, "listening");
}

/// Resolves at SIGTERM or SIGINT.
fn shutdown() -> Result<impl Future<Output = ()>, String> {
    let catch = |kind| signal(kind).map_err(|error| format!("cannot catch signals: {error}"));
    let (mut term, mut int) = (catch(SignalKind::terminate())?, catch(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}
