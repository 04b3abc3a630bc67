//! What a plugin said, and what it goes on to say. A follower asks once a second for what came after the last answer:
//! the server keeps no connection and no queue for it, and each line is printed once.

use std::time::Duration;

use serde_json::{Value, json};

use super::remote::{cell_text, say};
use super::{Outcome, Server};
use crate::http::client::{Method, encode};
use crate::telemetry::one_line;

/// Between two questions of a follower.
const PAUSE: Duration = Duration::from_secs(1);

/// The most that the server gives in one answer.
const PAGE: usize = 1_000;

pub(super) async fn show(name: String, follow: bool, lines: usize, server: Server) -> Outcome {
    let path = format!("{}/logs", server.plugin(&name));
    let mut query = format!("?limit={}", lines.min(PAGE));
    let mut first = !server.json && lines > 0;
    loop {
        let answer = server.ask(Method::GET, &format!("{path}{query}"), "", Vec::new()).await?;
        if answer["missed"] == json!(true) {
            eprintln!("tidegate: some lines between these are gone: the server keeps only the newest");
        }
        if std::mem::take(&mut first) && answer["lines"].as_array().is_none_or(Vec::is_empty) {
            eprintln!("tidegate: {name} has said nothing that the server still knows");
        }
        for line in answer["lines"].as_array().into_iter().flatten() {
            let text = if server.json { line.to_string() } else { line_text(line) };
            if !say(&text) {
                // Whoever reads this has seen enough.
                return Ok(());
            }
        }
        if !follow {
            return Ok(());
        }
        let next = answer["next"].as_str().ok_or("the server did not say where its lines end")?;
        query = format!("?limit={PAGE}&after={}", encode(next));
        if answer["more"] != json!(true) {
            tokio::time::sleep(PAUSE).await;
        }
    }
}

fn line_text(line: &Value) -> String {
    let version = line["version"].as_u64().map_or_else(|| "-".to_owned(), |version| format!("v{version}"));
    let [at, level, message] = ["at", "level", "message"].map(|name| cell_text(&line[name]));
    // Said by a guest: it is not to steer this terminal, nor to look like a line of its own.
    format!("{at}  {version:<4} {level:<5}  {}", one_line(&message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_a_time_a_version_and_a_level() {
        let line = json!({"at": "2013-01-01T05:15:00.000000Z", "level": "warn", "message": "late again", "version": 3});
        assert_eq!(line_text(&line), "2013-01-01T05:15:00.000000Z  v3   warn   late again");
        let gone = json!({"at": "-", "level": "error", "message": "x", "version": null});
        assert_eq!(line_text(&gone), "-  -    error  x");
        let forged = json!({"at": "-", "level": "info", "message": "x\n-  v1   error  \u{1b}[31my", "version": 1});
        assert_eq!(line_text(&forged), r"-  v1   info   x\n-  v1   error  \u{1b}[31my");
    }
}
