//! Settings: flags > environment (`TIDEGATE_`, nested by `__`) > TOML file > defaults. Unknown keys are refused.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::live::LiveOptions;
use crate::plugins::PluginOptions;
use crate::sql::SqlOptions;
use crate::store::StoreOptions;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    User,
    Service,
    Admin,
}

/// One bearer token of the configuration.
#[derive(Clone)]
pub struct Token {
    pub token: String,
    pub user: String,
    pub role: Role,
}

#[derive(Clone)]
pub struct HttpOptions {
    pub bind: SocketAddr,
    pub body_bytes: usize,
    pub plugin_body_bytes: usize,
    pub max_connections: usize,
    pub header_timeout: std::time::Duration,
    /// A subscriber that takes nothing for this long is disconnected.
    pub stall_limit: std::time::Duration,
    pub insecure_http: bool,
    pub ticket_ttl: std::time::Duration,
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
