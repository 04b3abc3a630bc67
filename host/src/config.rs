//! Settings: flags > environment (`TIDEGATE_`, nested by `__`) > TOML file > defaults. Unknown keys are refused.
//!
//! Two types: the raw settings as somebody wrote them (`config/raw.rs`, everything optional) and the checked
//! [`Config`], which the rest of the server is given by value. Nothing else reads settings from files or the
//! environment.

mod options;
mod raw;

pub use options::{Durability, HttpOptions, LiveOptions, PluginOptions, SqlOptions, StoreOptions};

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// From the least to the most that one may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    User,
    Service,
    Admin,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Role::User => "user",
            Role::Service => "service",
            Role::Admin => "admin",
        }
    }
}

/// One bearer token of the configuration.
#[derive(Clone)]
pub struct Token {
    pub token: String,
    pub user: String,
    pub role: Role,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// Checked settings.
#[derive(Clone)]
pub struct Config {
    pub data_dir: PathBuf,
    pub http: HttpOptions,
    pub tokens: Vec<Token>,
    pub admin_token: Option<String>,
    pub log_format: LogFormat,
    pub log_filter: String,
    pub store: StoreOptions,
    pub sql: SqlOptions,
    pub live: LiveOptions,
    pub plugins: PluginOptions,
}

/// What the command line says; wins over everything.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    pub config: Option<PathBuf>,
    pub data_dir: Option<PathBuf>,
    pub bind: Option<SocketAddr>,
    pub insecure_http: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the settings: {0}")]
    Read(String),
    #[error("unknown setting `{key}` in {origin}{}", near.as_deref().map(|n| format!("; did you mean `{n}`?")).unwrap_or_default())]
    Unknown { key: String, origin: String, near: Option<String> },
    #[error("setting `{key}`: {message}")]
    Invalid { key: String, message: String },
}

fn invalid(key: &str, message: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { key: key.to_owned(), message: message.into() }
}

/// Shorter admin tokens are refused: they could be guessed over the network.
const ADMIN_TOKEN_MIN: usize = 32;
/// The floor for the tokens of the file; 32 and more are recommended.
const TOKEN_MIN: usize = 16;
/// Longer user ids would bloat every key of a user table.
const USER_MAX: usize = 256;
/// Appear in documentation; a server must not run with them.
const SAMPLE_TOKENS: [&str; 5] = ["changeme", "change-me", "replace-me", "replace_me", "example-token"];

impl Config {
    /// Reads and checks everything; `environment` is the process environment (a parameter, so that tests bring theirs).
    pub fn load(
        flags: &Flags,
        environment: impl Iterator<Item = (std::ffi::OsString, std::ffi::OsString)>,
    ) -> Result<Config, ConfigError> {
        let raw = raw::load(flags.config.as_deref(), environment)?;
        let mut config = raw.check(flags.data_dir.as_deref())?;
        if let Some(bind) = flags.bind {
            config.http.bind = bind;
        }
        config.http.insecure_http |= flags.insecure_http;
        config.check_exposure()?;
        Ok(config)
    }

    /// The defaults, over a data directory.
    pub fn new(data_dir: &Path) -> Config {
        raw::Raw::default().check(Some(data_dir)).expect("the defaults are within their limits")
    }

    /// Every setting by its full name, as it is in effect, for `system.settings`. Secrets are shown as being there, no
    /// more.
    pub fn settings(&self) -> Vec<(String, String)> {
        raw::settings(self)
    }

    fn check_exposure(&self) -> Result<(), ConfigError> {
        let address = self.http.bind.ip();
        if address.is_loopback() || self.http.insecure_http {
            return Ok(());
        }
        let message = format!(
            "{address} can be reached from other machines, and this build speaks plain HTTP: tokens and rows would \
             travel readable. Bind to 127.0.0.1 behind a proxy that speaks TLS, or accept the risk with --insecure-http"
        );
        Err(invalid("server.bind", message))
    }
}

/// Checks one `[[tokens]]` list: lengths, samples, duplicates. Messages name the entry, never the token.
fn check_tokens(tokens: &[Token], admin: Option<&str>) -> Result<(), ConfigError> {
    let mut seen = HashSet::new();
    if let Some(admin) = admin {
        check_token("admin_token", admin, ADMIN_TOKEN_MIN)?;
        seen.insert(admin);
    }
    for (index, entry) in tokens.iter().enumerate() {
        check_token(&format!("tokens[{index}].token"), &entry.token, TOKEN_MIN)?;
        let user = format!("tokens[{index}].user");
        if entry.user.is_empty() || entry.user.len() > USER_MAX {
            return Err(invalid(&user, format!("a user id has 1 to {USER_MAX} bytes")));
        }
        if !seen.insert(entry.token.as_str()) {
            return Err(invalid(&format!("tokens[{index}].token"), "is used twice; every token names one user"));
        }
    }
    Ok(())
}

fn check_token(key: &str, token: &str, min: usize) -> Result<(), ConfigError> {
    let lower = token.to_ascii_lowercase();
    if SAMPLE_TOKENS.iter().any(|sample| lower.contains(sample)) {
        return Err(invalid(key, "is a sample from the documentation; make your own, say with `openssl rand -hex 32`"));
    }
    if token.len() < min {
        let message = format!(
            "has {} characters, at least {min} are needed; `openssl rand -hex 32` makes a good one",
            token.len()
        );
        return Err(invalid(key, message));
    }
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(invalid(key, "may only have visible ASCII characters, because it travels in a header"));
    }
    let first = token.bytes().next();
    if token.bytes().all(|byte| Some(byte) == first) {
        return Err(invalid(key, "is one character repeated; make a random one, say with `openssl rand -hex 32`"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
