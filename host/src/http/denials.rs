//! Who was refused what, told to the audit log: by the answer, at the one place that every answer comes by, or midway
//! in a result that had begun.

use std::net::IpAddr;

use axum::http::StatusCode;
use axum::response::Response;

use super::error::Problem;
use crate::db::{Db, Identity};
use crate::sql::Refusal;

/// What is known of a request when its answer is there.
pub struct Asked<'a> {
    pub who: Option<&'a Identity>,
    pub address: Option<IpAddr>,
    /// Whether it brought a token, valid or not.
    pub token: bool,
    /// Whether it brought a ticket.
    pub ticket: bool,
    pub path: &'a str,
}

/// Looks at an answer; what was refused is told.
pub fn look(db: &Db, asked: &Asked<'_>, response: &mut Response) {
    let Asked { who, address, path, .. } = *asked;
    match response.status() {
        StatusCode::UNAUTHORIZED => db.audit_denial(who, address, lacked(asked), call(path)),
        StatusCode::FORBIDDEN => match response.extensions_mut().remove::<Refusal>() {
            Some(refusal) => db.audit_denial(who, address, refusal.what, &refusal.object),
            None => db.audit_denial(who, address, "call", call(path)),
        },
        _ => {}
    }
}

/// Whoever reads a result that is on its way.
pub struct Reader {
    pub db: Db,
    pub who: Identity,
}

impl Reader {
    /// The result ends with this.
    pub fn ends_with(&self, problem: &Problem) {
        if let Some(refusal) = problem.refusal() {
            self.db.audit_denial(Some(&self.who), self.who.address, refusal.what, &refusal.object);
        }
    }
}

fn lacked(asked: &Asked<'_>) -> &'static str {
    match (asked.ticket, asked.token) {
        (true, _) => "invalid ticket",
        (false, true) => "invalid token",
        (false, false) => "no token",
    }
}

/// The call without what its sender put into the path, which may be anything.
fn call(path: &str) -> &'static str {
    const CALLS: [&str; 6] = ["/v1/sql", "/v1/live", "/v1/tables", "/v1/plugins", "/v1/auth/ticket", "/metrics"];
    let is = |call: &&str| path.strip_prefix(*call).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    CALLS.into_iter().find(is).unwrap_or("another call")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_told_without_what_its_sender_put_there() {
        for (path, told) in [
            ("/v1/sql", "/v1/sql"),
            ("/v1/plugins/main/late/try", "/v1/plugins"),
            ("/v1/pluginsecret", "another call"),
            ("/v1/auth/ticket", "/v1/auth/ticket"),
            ("", "another call"),
        ] {
            assert_eq!(call(path), told);
        }
    }

    #[test]
    fn what_was_lacking_is_told() {
        let lacked = |token, ticket| lacked(&Asked { who: None, address: None, token, ticket, path: "" });
        assert_eq!(lacked(false, false), "no token");
        assert_eq!(lacked(true, false), "invalid token");
        assert_eq!(lacked(true, true), "invalid ticket");
    }
}
