//! Settings as written: every key optional, every section known by name. [`Raw::check`] makes the checked `Config`, and
//! [`settings`] shows that by the same names.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt::{self, Display};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::config::{Environment, File, FileFormat, Source, Value, ValueKind};
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use super::{
    Config, ConfigError, Durability, HttpOptions, LiveOptions, LogFormat, PluginOptions, Role, SqlOptions,
    StoreOptions, Token, check_tokens, invalid,
};

/// Declares a section: all keys optional; their names as a list, so that an unknown key is answered by full name; and
/// what each shows of the checked settings, so that no key is left out of `system.settings`.
macro_rules! section {
    (
        $name:ident of $config:ident { $($key:ident : $ty:ty => $shown:expr),* $(,)? }
        $(sections { $($sub:ident : $subty:ident),* $(,)? })?
    ) => {
        #[derive(Debug, Default, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            $(pub $key: Option<$ty>,)*
            $($(pub $sub: $subty,)*)?
        }

        impl $name {
            fn keys(prefix: &str, out: &mut Vec<(String, Kind)>) {
                $(out.push((format!("{prefix}{}", stringify!($key)), <$ty as Written>::KIND));)*
                $($($subty::keys(&format!("{prefix}{}.", stringify!($sub)), out);)*)?
            }

            fn show($config: &Config, prefix: &str, out: &mut Vec<(String, String)>) {
                $(out.push(shown(prefix, stringify!($key), $shown));)*
                $($($subty::show($config, &format!("{prefix}{}.", stringify!($sub)), out);)*)?
            }
        }
    };
}

/// How a setting is written in a file. By itself the `config` crate takes one for another, and rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Text,
    Flag,
    Number,
    Bytes,
    Tokens,
}

impl Kind {
    fn is_of(self, value: &ValueKind) -> bool {
        match value {
            ValueKind::String(_) => matches!(self, Kind::Text | Kind::Bytes),
            ValueKind::Boolean(_) => self == Kind::Flag,
            ValueKind::I64(_) | ValueKind::I128(_) | ValueKind::U64(_) | ValueKind::U128(_) => {
                matches!(self, Kind::Number | Kind::Bytes)
            }
            ValueKind::Array(entries) => {
                self == Kind::Tokens && entries.iter().all(|entry| matches!(entry.kind, ValueKind::Table(_)))
            }
            ValueKind::Nil | ValueKind::Float(_) | ValueKind::Table(_) => false,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Kind::Text => "has to be text, in quotes",
            Kind::Flag => "has to be true or false, without quotes",
            Kind::Number => "has to be a whole number, without quotes",
            Kind::Bytes => "has to be a whole number of bytes, or text like \"8 MiB\"",
            Kind::Tokens => {
                "is a list, in the file alone: each token begins with a line [[tokens]], in double brackets"
            }
        }
    }
}

/// What the type of a setting says of how it is written.
trait Written {
    const KIND: Kind;
}

macro_rules! written {
    ($($kind:ident: $($ty:ty),*;)*) => { $($(impl Written for $ty { const KIND: Kind = Kind::$kind; })*)* };
}

written! {
    Text: String, PathBuf, SocketAddr;
    Flag: bool;
    Number: i32, u64, usize;
    Bytes: Size;
    Tokens: Vec<RawToken>;
}

fn shown(prefix: &str, key: &str, value: impl Display) -> (String, String) {
    (format!("{prefix}{key}"), value.to_string())
}

section!(Raw of config {
    data_dir: PathBuf => config.data_dir.display(),
    // Secrets are shown as being there, no more.
    admin_token: String => if config.admin_token.is_some() { "(set)" } else { "(in the data directory)" },
    tokens: Vec<RawToken> => format!("({} of them)", config.tokens.len()),
} sections {
    server: RawServer, storage: RawStorage, sql: RawSql, live: RawLive, plugins: RawPlugins, audit: RawAudit,
    log: RawLog,
});
section!(RawServer of config {
    bind: SocketAddr => config.http.bind,
    insecure_http: bool => config.http.insecure_http,
    max_connections: usize => config.http.max_connections,
    header_timeout_ms: u64 => config.http.header_timeout.as_millis(),
    body_bytes: Size => config.http.body_bytes,
    plugin_body_bytes: Size => config.http.plugin_body_bytes,
    body_total_bytes: Size => config.http.body_total_bytes,
    ticket_ttl_ms: u64 => config.http.ticket_ttl.as_millis(),
});
section!(RawStorage of config {
    durability: String => config.store.durability.as_str(),
    sync_interval_ms: u64 => config.store.sync_interval.as_millis(),
    max_commit_bytes: Size => config.store.max_commit_bytes,
    write_queue: usize => config.store.write_queue,
    log_commits: u64 => config.store.log_commits,
    log_bytes: Size => config.store.log_bytes,
    log_age_ms: u64 => config.store.log_age.as_millis(),
    idempotency_age_ms: u64 => config.store.idempotency_age.as_millis(),
} sections { rocksdb: RawRocksdb });
section!(RawRocksdb of config {
    write_buffer_size: Size => config.store.write_buffer_size,
    max_write_buffers: i32 => config.store.max_write_buffers,
    block_cache_size: Size => config.store.block_cache_size,
    max_background_jobs: i32 => config.store.max_background_jobs,
    max_open_files: i32 => config.store.max_open_files,
});
section!(RawSql of config {
    memory_bytes: Size => config.sql.memory_bytes,
    spill_bytes: Size => config.sql.spill_bytes,
    deadline_ms: u64 => config.sql.deadline.as_millis(),
    batch_rows: usize => config.sql.batch_rows,
    target_partitions: usize => config.sql.target_partitions,
    plan_cache_bytes: Size => config.sql.plan_cache_bytes,
    heavy_queries: usize => config.sql.heavy_queries,
    heavy_queue: usize => config.sql.heavy_queue,
});
section!(RawLive of config {
    heartbeat_ms: u64 => config.live.heartbeat.as_millis(),
    stall_limit_ms: u64 => config.http.stall_limit.as_millis(),
    commit_tail_bytes: Size => config.live.commit_tail_bytes,
    group_tail_bytes: Size => config.live.group_tail_bytes,
    chunk_bytes: Size => config.live.chunk_bytes,
    max_subscriptions: usize => config.live.max_subscriptions,
    max_per_user: usize => config.live.max_per_user,
    max_per_address: usize => config.live.max_per_address,
    requery_interval_ms: u64 => config.live.requery_interval.as_millis(),
    requery_bytes: Size => config.live.requery_bytes,
    requery_runs: usize => config.live.requery_runs,
});
section!(RawPlugins of config {
    ring_bytes: Size => config.plugins.ring_bytes,
    worker_bytes: Size => config.plugins.worker_bytes,
    workers: usize => config.plugins.workers,
    instances_per_worker: usize => config.plugins.instances_per_worker,
    module_bytes: Size => config.plugins.module_bytes,
    memory_bytes: Size => config.plugins.memory_bytes,
    stack_bytes: Size => config.plugins.stack_bytes,
    table_elements: usize => config.plugins.table_elements,
    batch_ms: u64 => config.plugins.batch_time.as_millis(),
    init_ms: u64 => config.plugins.init_time.as_millis(),
    compile_ms: u64 => config.plugins.compile_time.as_millis(),
    output_bytes: Size => config.plugins.output_bytes,
    log_bytes: Size => config.plugins.log_bytes,
    drop_instances_seed: u64 => config.plugins.drop_instances_seed,
});
section!(RawAudit of config {
    keep_records: u64 => config.store.audit_records,
    keep_days: u64 => config.store.audit_age.as_secs() / DAY_SECONDS,
});
section!(RawLog of config {
    format: String => if config.log_format == LogFormat::Json { "json" } else { "text" },
    filter: String => &config.log_filter,
});

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawToken {
    token: Option<String>,
    user: Option<String>,
    role: Option<String>,
}

/// The token stays out of debug output.
impl fmt::Debug for RawToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawToken").field("user", &self.user).field("role", &self.role).finish_non_exhaustive()
    }
}

const TOKEN_KEYS: [&str; 3] = ["token", "user", "role"];

/// A number of bytes: `8388608`, `"8 MiB"`, `"64KiB"`.
#[derive(Clone, Copy, Debug)]
pub struct Size(u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, like 8388608 or \"8 MiB\"")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
                Ok(Size(bytes))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Size, E> {
                u64::try_from(bytes).map(Size).map_err(|_| E::invalid_value(de::Unexpected::Signed(bytes), &self))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                parse_size(text).map(Size).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let shift = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "kib" => 10,
        "mib" => 20,
        "gib" => 30,
        _ => return None,
    };
    text[..digits].parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Variables with our prefix that belong to the scripts around the server, not to it.
const FOREIGN_VARIABLES: [&str; 5] = ["bin", "plugins", "url", "token", "token_file"];

/// Reads the file (flag or `TIDEGATE_CONFIG`) and the environment over it.
pub fn load(file: Option<&Path>, environment: impl Iterator<Item = (OsString, OsString)>) -> Result<Raw, ConfigError> {
    let mut variables = ours(environment)?;
    let from_environment = variables.remove("config").map(PathBuf::from);
    let mut builder = ::config::Config::builder();
    if let Some(path) = file.or(from_environment.as_deref()) {
        let text = std::fs::read_to_string(path).map_err(|e| ConfigError::Read(format!("{}: {e}", path.display())))?;
        let source = File::from_str(&text, FileFormat::Toml);
        // The file is checked alone first, so that a mistake is told with the file's name.
        check(source.collect().map_err(|e| file_error(path, &e))?, &path.display().to_string(), Kind::is_of)?;
        builder = builder.add_source(source);
    }
    let source = Environment::default().separator("__").source(Some(variables.clone()));
    let overlay = ::config::Config::builder().add_source(source.clone()).build().map_err(read_error)?;
    // Variables are text, whatever they say.
    let is_of = |kind, _: &ValueKind| kind != Kind::Tokens;
    check(overlay.collect().map_err(read_error)?, "the environment (TIDEGATE_…)", is_of)?;
    builder.add_source(source).build().map_err(read_error)?.try_deserialize().map_err(read_error)
}

fn read_error(error: ::config::ConfigError) -> ConfigError {
    ConfigError::Read(error.to_string())
}

/// Only where and what: the parser's own message quotes the line, and the line may hold a token.
fn file_error(path: &Path, error: &::config::ConfigError) -> ConfigError {
    let text = error.to_string();
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let first = lines.next().unwrap_or("not TOML");
    let last = lines.next_back().filter(|line| !line.contains('|')).unwrap_or("");
    ConfigError::Read(format!("{}: {first} {last}", path.display()))
}

/// Variables that start with `TIDEGATE_`, without it, in lower case.
fn ours(environment: impl Iterator<Item = (OsString, OsString)>) -> Result<HashMap<String, String>, ConfigError> {
    let mut variables = HashMap::new();
    for (name, value) in environment {
        let Some(key) = name.to_str().and_then(|name| name.strip_prefix("TIDEGATE_")) else { continue };
        let key = key.to_ascii_lowercase();
        if FOREIGN_VARIABLES.contains(&key.as_str()) {
            continue;
        }
        let value = value
            .into_string()
            .map_err(|_| ConfigError::Read(format!("the variable {} is not UTF-8", name.to_string_lossy())))?;
        variables.insert(key, value);
    }
    Ok(variables)
}

/// The full names of all settings.
#[cfg(test)]
pub fn all_keys() -> Vec<String> {
    known().into_iter().map(|(key, _)| key).collect()
}

/// All settings by their full names.
fn known() -> Vec<(String, Kind)> {
    let mut keys = Vec::new();
    Raw::keys("", &mut keys);
    keys
}

/// Every setting by its full name, as it is in effect.
pub fn settings(config: &Config) -> Vec<(String, String)> {
    let mut settings = Vec::new();
    Raw::show(config, "", &mut settings);
    settings
}

/// Refuses the first unknown key, by its full name, with the closest known one; then the first value that is not written
/// as its setting is. No value is shown: it may be a token.
fn check(
    table: HashMap<String, Value>,
    origin: &str,
    is_of: impl Fn(Kind, &ValueKind) -> bool,
) -> Result<(), ConfigError> {
    let known = known();
    let mut found = Vec::new();
    for (key, value) in table {
        flatten(key, value, &mut found);
    }
    found.sort_by(|(a, _), (b, _)| a.cmp(b));
    let kind_of = |key: &str| match key.strip_prefix("tokens[") {
        Some(entry) => {
            TOKEN_KEYS.iter().any(|name| entry.split_once("].").is_some_and(|(_, k)| k == *name)).then_some(Kind::Text)
        }
        None => known.iter().find(|(name, _)| name == key).map(|(_, kind)| *kind),
    };
    for (key, _) in &found {
        if kind_of(key).is_none() {
            let near = known.iter().map(|(name, _)| (distance(name, key), name)).min().filter(|(d, _)| *d <= 3);
            let near = near.map(|(_, name)| name.clone());
            return Err(ConfigError::Unknown { key: key.clone(), origin: origin.to_owned(), near });
        }
    }
    for (key, value) in &found {
        if let Some(kind) = kind_of(key).filter(|kind| !is_of(*kind, value)) {
            return Err(invalid(key, format!("{} ({origin})", kind.as_str())));
        }
    }
    Ok(())
}

/// All leaves by their full names. `tokens` is one, and what stands in its entries.
fn flatten(key: String, value: Value, out: &mut Vec<(String, ValueKind)>) {
    match value.kind {
        ValueKind::Table(table) if key != "tokens" => {
            table.into_iter().for_each(|(k, v)| flatten(format!("{key}.{k}"), v, out));
        }
        kind => {
            if let (ValueKind::Array(entries), "tokens") = (&kind, key.as_str()) {
                for (index, entry) in entries.iter().enumerate() {
                    if let ValueKind::Table(table) = &entry.kind {
                        out.extend(table.iter().map(|(k, v)| (format!("tokens[{index}].{k}"), v.kind.clone())));
                    }
                }
            }
            out.push((key, kind));
        }
    }
}

/// Edits between two short names.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// A number with its default and limits.
fn bounded<T: PartialOrd + Display>(key: &str, given: Option<T>, default: T, min: T, max: T) -> Result<T, ConfigError> {
    let value = given.unwrap_or(default);
    if value < min || value > max {
        return Err(invalid(key, format!("{value} is outside {min} to {max}")));
    }
    Ok(value)
}

fn bytes(key: &str, given: Option<Size>, default: u64, min: u64, max: u64) -> Result<usize, ConfigError> {
    let value = bounded(key, given.map(|size| size.0), default, min, max)?;
    usize::try_from(value).map_err(|_| invalid(key, "does not fit this machine's address space"))
}

fn millis(key: &str, given: Option<u64>, default: u64, min: u64, max: u64) -> Result<Duration, ConfigError> {
    bounded(key, given, default, min, max).map(Duration::from_millis)
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const DAY_SECONDS: u64 = 86_400;
const DAY_MILLIS: u64 = 1_000 * DAY_SECONDS;

fn cores() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

impl Raw {
    pub fn check(self, data_dir: Option<&Path>) -> Result<Config, ConfigError> {
        let data_dir = data_dir.map(Path::to_owned).or(self.data_dir).unwrap_or_else(|| PathBuf::from("data"));
        let tokens = self.tokens.unwrap_or_default().into_iter().enumerate();
        let tokens = tokens.map(|(index, token)| token.check(index)).collect::<Result<Vec<Token>, _>>()?;
        check_tokens(&tokens, self.admin_token.as_deref())?;
        let plugins = self.plugins.check()?;
        let stall_limit = millis("live.stall_limit_ms", self.live.stall_limit_ms, 30_000, 100, 600_000)?;
        Ok(Config {
            http: self.server.check(stall_limit, plugins.module_bytes)?,
            store: self.storage.check(&data_dir, &self.audit)?,
            sql: self.sql.check(&data_dir)?,
            live: self.live.check(plugins.workers)?,
            plugins,
            tokens,
            admin_token: self.admin_token,
            log_format: log_format(self.log.format.as_deref())?,
            log_filter: self.log.filter.unwrap_or_else(|| "info".to_owned()),
            data_dir,
        })
    }
}

impl RawToken {
    fn check(self, index: usize) -> Result<Token, ConfigError> {
        let at = |name: &str| format!("tokens[{index}].{name}");
        let given = |name: &str, value: Option<String>| value.ok_or_else(|| invalid(&at(name), "is missing"));
        let role = match given("role", self.role)?.as_str() {
            "user" => Role::User,
            "service" => Role::Service,
            "admin" => Role::Admin,
            other => return Err(invalid(&at("role"), format!("is `user`, `service` or `admin`, not {other:?}"))),
        };
        Ok(Token { token: given("token", self.token)?, user: given("user", self.user)?, role })
    }
}

fn log_format(given: Option<&str>) -> Result<LogFormat, ConfigError> {
    match given {
        None | Some("text") => Ok(LogFormat::Text),
        Some("json") => Ok(LogFormat::Json),
        Some(other) => Err(invalid("log.format", format!("is `text` or `json`, not {other:?}"))),
    }
}

impl RawServer {
    fn check(self, stall_limit: Duration, module_bytes: usize) -> Result<HttpOptions, ConfigError> {
        let body_bytes = bytes("server.body_bytes", self.body_bytes, MIB, KIB, 64 * MIB)?;
        // WAT text is longer than the module it stands for.
        let plugin_default = (module_bytes as u64) * 2;
        let plugin_body_bytes =
            bytes("server.plugin_body_bytes", self.plugin_body_bytes, plugin_default, KIB, 64 * MIB)?;
        let body_total_bytes = bytes("server.body_total_bytes", self.body_total_bytes, 128 * MIB, MIB, 16 * GIB)?;
        for (setting, bytes) in [("server.body_bytes", body_bytes), ("server.plugin_body_bytes", plugin_body_bytes)] {
            if bytes > body_total_bytes {
                let message = format!(
                    "is {body_total_bytes}, and {setting}, which is {bytes}, allows one body alone that many: raise the \
                     one or lower the other"
                );
                return Err(invalid("server.body_total_bytes", message));
            }
        }
        Ok(HttpOptions {
            bind: self.bind.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 8433))),
            body_bytes,
            plugin_body_bytes,
            body_total_bytes,
            max_connections: bounded("server.max_connections", self.max_connections, 10_000, 1, 1_000_000)?,
            header_timeout: millis("server.header_timeout_ms", self.header_timeout_ms, 10_000, 100, 120_000)?,
            stall_limit,
            insecure_http: self.insecure_http.unwrap_or(false),
            ticket_ttl: millis("server.ticket_ttl_ms", self.ticket_ttl_ms, 30_000, 1_000, 600_000)?,
        })
    }
}

impl RawStorage {
    fn check(self, data_dir: &Path, audit: &RawAudit) -> Result<StoreOptions, ConfigError> {
        let durability = match self.durability.as_deref() {
            None | Some("sync") => Durability::Sync,
            Some("interval") => Durability::Interval,
            Some("os") => Durability::Os,
            Some(other) => {
                let message = format!("is `sync`, `interval` or `os`, not {other:?}");
                return Err(invalid("storage.durability", message));
            }
        };
        let interval = if durability == Durability::Os { 1_000 } else { 50 };
        let sync_interval = millis("storage.sync_interval_ms", self.sync_interval_ms, interval, 1, 10_000)?;
        let rocks = self.rocksdb;
        let at = |key: &str| format!("storage.rocksdb.{key}");
        Ok(StoreOptions {
            path: data_dir.to_owned(),
            write_buffer_size: bytes(&at("write_buffer_size"), rocks.write_buffer_size, 8 * MIB, 64 * KIB, GIB)?,
            max_write_buffers: bounded(&at("max_write_buffers"), rocks.max_write_buffers, 2, 1, 16)?,
            block_cache_size: bytes(&at("block_cache_size"), rocks.block_cache_size, 128 * MIB, MIB, 1024 * GIB)?,
            max_background_jobs: bounded(&at("max_background_jobs"), rocks.max_background_jobs, 2, 1, 64)?,
            max_open_files: bounded(&at("max_open_files"), rocks.max_open_files, 256, 16, 1_000_000)?,
            max_commit_bytes: bytes("storage.max_commit_bytes", self.max_commit_bytes, 16 * MIB, 4 * KIB, 256 * MIB)?,
            log_commits: bounded("storage.log_commits", self.log_commits, 1_000_000, 1, u64::MAX)?,
            log_bytes: bytes("storage.log_bytes", self.log_bytes, 4 * GIB, 64 * KIB, 1 << 50)? as u64,
            log_age: millis("storage.log_age_ms", self.log_age_ms, 7 * DAY_MILLIS, 1_000, 3_650 * DAY_MILLIS)?,
            idempotency_age: millis(
                "storage.idempotency_age_ms",
                self.idempotency_age_ms,
                DAY_MILLIS,
                1_000,
                30 * DAY_MILLIS,
            )?,
            audit_records: bounded("audit.keep_records", audit.keep_records, 100_000, 1, 10_000_000)?,
            audit_age: bounded("audit.keep_days", audit.keep_days, 365, 1, 3_650)
                .map(|days| Duration::from_secs(days * DAY_SECONDS))?,
            durability,
            sync_interval,
            write_queue: bounded("storage.write_queue", self.write_queue, 1_024, 1, 1_000_000)?,
        })
    }
}

impl RawSql {
    fn check(self, data_dir: &Path) -> Result<SqlOptions, ConfigError> {
        let spill_bytes = self.spill_bytes.map(|size| size.0);
        let plan_cache_bytes = self.plan_cache_bytes.map(|size| size.0);
        Ok(SqlOptions {
            memory_bytes: bytes("sql.memory_bytes", self.memory_bytes, 256 * MIB, MIB, 1024 * GIB)?,
            spill_bytes: bounded("sql.spill_bytes", spill_bytes, GIB, 0, 1024 * GIB)?,
            spill_dir: data_dir.join("spill"),
            deadline: millis("sql.deadline_ms", self.deadline_ms, 5_000, 10, 30_000)?,
            batch_rows: bounded("sql.batch_rows", self.batch_rows, 8_192, 1, 65_536)?,
            target_partitions: bounded("sql.target_partitions", self.target_partitions, cores().min(8), 1, 64)?,
            plan_cache_bytes: bounded("sql.plan_cache_bytes", plan_cache_bytes, 16 * MIB, 0, GIB)?,
            heavy_queries: bounded("sql.heavy_queries", self.heavy_queries, cores().max(2), 1, 1_024)?,
            // Enough for a burst of clients that all ask at once; they wait no longer than their deadline.
            heavy_queue: bounded("sql.heavy_queue", self.heavy_queue, 256, 0, 65_536)?,
        })
    }
}

impl RawLive {
    /// Groups live on the workers that run their plugins, so both sides have the same number of them.
    fn check(self, workers: usize) -> Result<LiveOptions, ConfigError> {
        Ok(LiveOptions {
            workers,
            commit_tail_bytes: bytes("live.commit_tail_bytes", self.commit_tail_bytes, 32 * MIB, 64 * KIB, 16 * GIB)?,
            group_tail_bytes: bytes("live.group_tail_bytes", self.group_tail_bytes, 256 * KIB, KIB, GIB)?,
            chunk_bytes: bytes("live.chunk_bytes", self.chunk_bytes, 256 * KIB, 4 * KIB, 16 * MIB)?,
            heartbeat: millis("live.heartbeat_ms", self.heartbeat_ms, 15_000, 50, 60_000)?,
            max_subscriptions: bounded("live.max_subscriptions", self.max_subscriptions, 100_000, 1, 10_000_000)?,
            // As many as there may be connections: an operator who shares a server among users sets less.
            max_per_user: bounded("live.max_per_user", self.max_per_user, 10_000, 1, 10_000_000)?,
            max_per_address: bounded("live.max_per_address", self.max_per_address, 20_000, 1, 10_000_000)?,
            // Several times a second looks alive to people; a run costs about what the query costs.
            requery_interval: millis("live.requery_interval_ms", self.requery_interval_ms, 250, 1, 60_000)?,
            requery_bytes: bytes("live.requery_bytes", self.requery_bytes, 4 * MIB, 4 * KIB, GIB)?,
            // As many as there are heavy queries at once.
            requery_runs: bounded("live.requery_runs", self.requery_runs, 2, 1, 64)?,
        })
    }
}

impl RawPlugins {
    fn check(self) -> Result<PluginOptions, ConfigError> {
        let at = |key: &str| format!("plugins.{key}");
        let ring_bytes = bytes(&at("ring_bytes"), self.ring_bytes, 4 * MIB, 64 * KIB, 256 * MIB)? as u32;
        if !ring_bytes.is_power_of_two() {
            return Err(invalid("plugins.ring_bytes", format!("{ring_bytes} is not a power of two")));
        }
        let worker_bytes = bytes(&at("worker_bytes"), self.worker_bytes, MIB, 64 * KIB, 64 * MIB)? as u32;
        if !worker_bytes.is_multiple_of(64 * KIB as u32) {
            return Err(invalid("plugins.worker_bytes", format!("{worker_bytes} is not a multiple of 64 KiB")));
        }
        let workers = bounded(&at("workers"), self.workers, cores().min(16), 1, 64)?;
        let instances = bounded(&at("instances_per_worker"), self.instances_per_worker, 256, 1, 10_000)?;
        Ok(PluginOptions {
            ring_bytes,
            worker_bytes,
            module_bytes: bytes(&at("module_bytes"), self.module_bytes, 4 * MIB, KIB, 16 * MIB)?,
            memory_bytes: bytes(&at("memory_bytes"), self.memory_bytes, 16 * MIB, 64 * KIB, 128 * MIB)?,
            stack_bytes: bytes(&at("stack_bytes"), self.stack_bytes, 512 * KIB, 64 * KIB, MIB)?,
            table_elements: bounded(&at("table_elements"), self.table_elements, 20_000, 1, 100_000)?,
            batch_time: millis(&at("batch_ms"), self.batch_ms, 20, 1, 1_000)?,
            init_time: millis(&at("init_ms"), self.init_ms, 100, 1, 1_000)?,
            output_bytes: bytes(&at("output_bytes"), self.output_bytes, MIB, KIB, 10 * MIB)?,
            log_bytes: bytes(&at("log_bytes"), self.log_bytes, 16 * KIB, 0, MIB)?,
            compile_time: millis(&at("compile_ms"), self.compile_ms, 15_000, 100, 120_000)?,
            workers,
            instances_per_worker: instances,
            drop_instances_seed: self.drop_instances_seed.unwrap_or(0),
            compiler: None,
            cache_dir: None,
        })
    }
}
