//! The limit: a program that writes the same bytes to the same number of sockets, one `write` each, and nothing else. Or,
//! for what nobody can tell sooner who keeps a promise, after the same bytes were appended to a file and synced.
//!
//! It is a process of its own (`load peer BYTES` and `load peer BYTES sync`), so that its CPU is counted apart. It accepts
//! as many connections as it is told on standard input (`accept N`) and writes one event to each of them for every line
//! `round`.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, ChildStdin, Command, Stdio};

use rustix::process::Pid;

use crate::reader::stamp;

pub struct Peer {
    child: Child,
    orders: ChildStdin,
    address: SocketAddr,
    answers: BufReader<std::process::ChildStdout>,
}

impl Peer {
    pub fn start(event_bytes: usize, sync: bool) -> Peer {
        let program = std::env::current_exe().expect("this program has a path");
        let mut child = Command::new(program)
            .args(["peer", &event_bytes.to_string()])
            .args(sync.then_some("sync"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the peer starts");
        let orders = child.stdin.take().expect("stdin is piped");
        let answers = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let mut peer = Peer { child, orders, address: SocketAddr::from(([127, 0, 0, 1], 0)), answers };
        peer.address = peer.answer().parse().expect("an address");
        peer
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Before they are made: more than its listener's queue holds would wait for their turn, each longer than the last.
    pub fn accept(&mut self, connections: usize) {
        self.order(&format!("accept {connections}"));
    }

    /// Waits until it has accepted them.
    pub fn ready(&mut self) {
        assert_eq!(self.answer(), "ready");
    }

    /// One event for everybody; does not wait for it.
    pub fn round(&mut self) {
        self.order(&format!("round {}", stamp()));
    }

    fn order(&mut self, line: &str) {
        writeln!(self.orders, "{line}").expect("the peer takes orders");
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("the peer answers");
        line.trim().to_owned()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // An error says that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The peer's own side.
pub fn serve(mut arguments: impl Iterator<Item = String>) {
    let event_bytes: usize = arguments.next().and_then(|text| text.parse().ok()).expect("bytes an event");
    // Where the servers under test have their data as well.
    let mut log = arguments.next().map(|_| tempfile::tempfile().expect("a file"));
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    println!("{}", listener.local_addr().expect("bound"));
    let mut sockets: Vec<TcpStream> = Vec::new();
    for line in std::io::stdin().lines() {
        let line = line.expect("orders are text");
        match line.split_once(' ') {
            Some(("accept", count)) => {
                for _ in 0..count.parse::<usize>().expect("a number") {
                    let (socket, _) = listener.accept().expect("a connection");
                    socket.set_nodelay(true).expect("TCP_NODELAY");
                    sockets.push(socket);
                }
                println!("ready");
            }
            Some(("round", stamp)) => {
                let mut event = stamp.to_owned().into_bytes();
                event.resize(event_bytes, b'x');
                if let Some(log) = &mut log {
                    log.write_all(&event).and_then(|()| log.sync_data()).expect("the disk takes it");
                }
                for socket in &mut sockets {
                    socket.write_all(&event).expect("the reader reads");
                }
            }
            _ => panic!("an order that nobody gave: {line}"),
        }
    }
}
