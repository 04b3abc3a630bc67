//! The server process under test.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::sync::oneshot;

use crate::client::Client;

/// Opening a store that has much to recover, on a busy machine.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// Token of the administrator, given by environment; the others are in the configuration file.
pub const ADMIN_TOKEN: &str = "the-administrators-token-of-these-tests-0001";

/// User and role of the tokens in the configuration file.
const USERS: [(&str, &str); 4] = [("alice", "user"), ("bob", "user"), ("al", "user"), ("robot", "service")];

/// What is special about a server.
#[derive(Clone, Debug)]
pub struct Options {
    /// How soon a quiet stream says `uptodate`. Short, or the tests would wait.
    pub heartbeat_ms: u64,
    /// More lines of the configuration file; whole sections other than `[live]`.
    pub config: String,
    /// More lines of its `[live]` section.
    pub live: String,
    pub env: Vec<(String, String)>,
    pub args: Vec<String>,
    /// A data directory to begin with, which stays as it is: a copy is used.
    pub data: Option<PathBuf>,
    /// Where the data directory is to be, in a folder that is there; None: beside the configuration.
    pub data_at: Option<PathBuf>,
    /// How many files the server may have open; None: as many as this process.
    pub open_files: Option<u64>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            heartbeat_ms: 300,
            config: String::new(),
            live: String::new(),
            env: Vec::new(),
            args: Vec::new(),
            data: None,
            data_at: None,
            open_files: None,
        }
    }
}

/// A running server with its own directory. Dropping it kills the process and removes the directory.
pub struct TestServer {
    dir: TempDir,
    options: Options,
    process: Option<Process>,
    /// Where the server is now; clients share it, because a restart picks another port.
    url: Arc<RwLock<String>>,
    http: reqwest::Client,
}

/// One life of the server.
struct Process {
    child: Child,
    output: Output,
    /// They end when the process closes its two streams.
    readers: Vec<JoinHandle<()>>,
}

/// What the process printed so far, both streams.
#[derive(Clone, Default)]
pub struct Output(Arc<Mutex<Vec<String>>>);

impl TestServer {
    pub async fn start() -> Self {
        Self::with(Options::default()).await
    }

    pub async fn with(options: Options) -> Self {
        let dir = tempfile::Builder::new().prefix("tidegate-test-").tempdir().expect("a temporary directory");
        std::fs::write(dir.path().join("tidegate.toml"), config(&options)).expect("the configuration file is written");
        if let Some(data) = &options.data {
            copy(data, &dir.path().join("data"));
        }
        // Environment proxies are for the outside; no time limit here, because streams have none.
        let http = reqwest::Client::builder().no_proxy().build().expect("an HTTP client");
        let mut server = TestServer { dir, options, process: None, url: Arc::default(), http };
        server.restart().await;
        server
    }

    /// Starts the server again on its directory; it must not be running.
    pub async fn restart(&mut self) {
        self.start_at("127.0.0.1:0").await;
    }

    /// The same on the port that it had: where its clients come back to.
    pub async fn restart_in_place(&mut self) {
        let url = self.url.read().unwrap_or_else(PoisonError::into_inner).clone();
        self.start_at(url.trim_start_matches("http://")).await;
    }

    async fn start_at(&mut self, bind: &str) {
        assert!(self.process.is_none(), "the server is still running");
        let mut command = self.command_at(bind);
        let (mut process, bound) = Process::spawn(&mut command);
        let url = match tokio::time::timeout(START_PATIENCE, bound).await {
            Ok(Ok(url)) => url,
            _ => {
                process.kill();
                panic!("the server did not bind; command: {command:?}\n{}", process.output.text());
            }
        };
        *self.url.write().unwrap_or_else(PoisonError::into_inner) = url;
        self.process = Some(process);
        self.admin().until_ready().await;
    }

    /// As power would: no chance to finish anything.
    pub fn kill9(&mut self) {
        self.process.take().expect("a running server").kill();
    }

    /// Asks the server to end and waits for it.
    pub async fn sigterm(&mut self) -> ExitStatus {
        let mut process = self.process.take().expect("a running server");
        kill_process(process.pid(), Signal::TERM).expect("the server takes a signal");
        let output = process.output.clone();
        let ended = tokio::task::spawn_blocking(move || process.child.wait());
        match tokio::time::timeout(crate::PATIENCE, ended).await {
            Ok(status) => status.expect("the waiting thread lives").expect("the server is waited for"),
            Err(_) => panic!("the server did not end on TERM\n{}", output.text()),
        }
    }

    pub fn client(&self, user: &str) -> Client {
        let token = if user == "admin" { ADMIN_TOKEN.to_owned() } else { token(user) };
        Client::new(self.http.clone(), Arc::clone(&self.url), Some(token))
    }

    pub fn admin(&self) -> Client {
        self.client("admin")
    }

    /// With a token that nobody has, or none.
    pub fn stranger(&self, token: Option<&str>) -> Client {
        Client::new(self.http.clone(), Arc::clone(&self.url), token.map(str::to_owned))
    }

    pub fn data_dir(&self) -> PathBuf {
        self.options.data_at.clone().unwrap_or_else(|| self.dir.path().join("data"))
    }

    pub fn pid(&self) -> Pid {
        self.process.as_ref().expect("a running server").pid()
    }

    /// What the present process printed so far.
    pub fn output(&self) -> String {
        self.process.as_ref().expect("a running server").output.text()
    }

    /// Waits until it has printed these words: what it writes is read by a thread of its own, a moment later.
    pub async fn until_said(&self, words: &str) {
        let said = async {
            while !self.output().contains(words) {
                tokio::task::yield_now().await;
            }
        };
        let waited = tokio::time::timeout(crate::PATIENCE, said).await;
        waited.unwrap_or_else(|_| panic!("the server never said {words:?}: {}", self.output()));
    }

    /// The command that starts this server, for tests that start another beside it.
    pub fn command(&self) -> Command {
        self.command_at("127.0.0.1:0")
    }

    fn command_at(&self, bind: &str) -> Command {
        let mut command = command(&self.dir.path().join("tidegate.toml"), &self.data_dir());
        command
            .args(["--bind", bind])
            .args(&self.options.args)
            .envs(self.options.env.iter().map(|(name, value)| (name, value)));
        match self.options.open_files {
            Some(files) => with_open_files(&command, files),
            None => command,
        }
    }
}

/// The same command with a limit of open files. The shell is replaced by it, so the process is the same as well.
fn with_open_files(command: &Command, files: u64) -> Command {
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -n \"$0\" && exec \"$@\"", &files.to_string()]);
    limited.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    limited.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    limited
}

impl Drop for TestServer {
    fn drop(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        process.kill();
        if std::thread::panicking() {
            eprintln!("---- the server, data in {} ----\n{}", self.data_dir().display(), process.output.text());
            // Kept to be looked at.
            self.dir.disable_cleanup(true);
        }
    }
}

/// Copies a folder with all that is in it.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap_or_else(|error| panic!("{}: {error}", to.display()));
    for entry in std::fs::read_dir(from).unwrap_or_else(|error| panic!("{}: {error}", from.display())) {
        let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).expect("an entry of a folder");
        if path.is_dir() {
            copy(&path, &to.join(name));
        } else {
            std::fs::copy(&path, to.join(name)).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
    }
}

/// `tidegate serve` with nothing of this process's environment that would change its settings.
pub fn command(config: &Path, data_dir: &Path) -> Command {
    let mut command = Command::new(binary());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TIDEGATE_") {
            command.env_remove(name);
        }
    }
    // Plugins are pure, so losing an instance between two calls may change nothing: in every test they are lost.
    command.env("TIDEGATE_PLUGINS__DROP_INSTANCES_SEED", "1");
    command.env("TIDEGATE_ADMIN_TOKEN", ADMIN_TOKEN).arg("serve").arg("--config").arg(config);
    command.arg("--data-dir").arg(data_dir);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs a command that is to end by itself, refused or done; its status and all it printed.
pub async fn run_to_end(mut command: Command) -> (ExitStatus, String) {
    let (process, _bound) = Process::spawn(&mut command);
    let Process { mut child, output, readers } = process;
    let pid = Pid::from_child(&child);
    let ended = tokio::task::spawn_blocking(move || child.wait());
    let status = match tokio::time::timeout(crate::PATIENCE, ended).await {
        Ok(status) => status.expect("the waiting thread lives").expect("the process is waited for"),
        Err(_) => {
            let _ = kill_process(pid, Signal::KILL);
            panic!("{command:?} did not end by itself\n{}", output.text());
        }
    };
    // What was said last may still be on its way from the pipe.
    for reader in readers {
        reader.join().expect("reading lines does not panic");
    }
    (status, output.text())
}

impl Process {
    /// Starts the command; the receiver gets the address once the server says it is bound, or an error when it ends.
    fn spawn(command: &mut Command) -> (Process, oneshot::Receiver<String>) {
        let mut child = command.spawn().unwrap_or_else(|error| {
            panic!("{command:?}: {error}; build the server first (`cargo build`, or `sh tests/run.sh`)")
        });
        let (output, (sender, bound)) = (Output::default(), oneshot::channel());
        let stdout = child.stdout.take().expect("stdout is piped");
        let stderr = child.stderr.take().expect("stderr is piped");
        let readers = vec![output.collect("", stdout, Some(sender)), output.collect("! ", stderr, None)];
        (Process { child, output, readers }, bound)
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn kill(&mut self) {
        // An error says that it has ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Output {
    /// Collects the lines of one stream on a thread, which ends with the stream.
    fn collect(
        &self,
        mark: &'static str,
        stream: impl Read + Send + 'static,
        mut bound: Option<oneshot::Sender<String>>,
    ) -> JoinHandle<()> {
        let lines = Arc::clone(&self.0);
        std::thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                if let Some((_, url)) = line.split_once("listening on ")
                    && let Some(bound) = bound.take()
                {
                    // Nobody waits any more: the test has ended.
                    let _ = bound.send(url.trim().to_owned());
                }
                lines.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{mark}{line}"));
            }
        })
    }

    pub fn text(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
    }
}

/// The folder of this build's programs: `TIDEGATE_BIN`'s, else the one that this test program's own lies in.
pub fn target_dir() -> PathBuf {
    if let Some(binary) = std::env::var_os("TIDEGATE_BIN") {
        return PathBuf::from(binary).parent().expect("TIDEGATE_BIN is a file in a folder").to_owned();
    }
    let this = std::env::current_exe().expect("this program has a path");
    let deps = this.parent().expect("programs lie in a folder");
    deps.parent().expect("test programs lie in deps/ of the profile's folder").to_owned()
}

pub fn binary() -> PathBuf {
    std::env::var_os("TIDEGATE_BIN").map_or_else(|| target_dir().join("tidegate"), PathBuf::from)
}

fn token(user: &str) -> String {
    format!("the-token-of-{user}-in-these-tests-0123456789")
}

fn config(options: &Options) -> String {
    let users: HashMap<&str, &str> = USERS.into();
    let mut text = String::new();
    for (user, role) in users {
        text.push_str(&format!("[[tokens]]\ntoken = \"{}\"\nuser = \"{user}\"\nrole = \"{role}\"\n", token(user)));
    }
    text.push_str(&format!("[live]\nheartbeat_ms = {}\n{}\n{}\n", options.heartbeat_ms, options.live, options.config));
    text
}
