use std::ffi::OsString;
use std::io::Write;
use std::time::Duration;

use super::*;

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

fn load(toml: &str, environment: &[(&str, &str)], mut flags: Flags) -> Result<Config, ConfigError> {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(toml.as_bytes()).expect("written");
    flags.config = Some(file.path().to_owned());
    let environment = environment.iter().map(|(k, v)| (OsString::from(k), OsString::from(v)));
    Config::load(&flags, environment)
}

fn message(toml: &str, environment: &[(&str, &str)]) -> String {
    load(toml, environment, Flags::default()).err().expect("refused").to_string()
}

#[test]
fn flags_win_over_environment_over_file_over_defaults() {
    let toml = "data_dir = 'file'\n[server]\nbind = '127.0.0.1:1'\nmax_connections = 7\n\
                [storage.rocksdb]\nblock_cache_size = '2 MiB'\n[sql]\ndeadline_ms = 100";
    let environment = [
        ("TIDEGATE_DATA_DIR", "environment"),
        ("TIDEGATE_SERVER__BIND", "127.0.0.1:2"),
        ("TIDEGATE_STORAGE__ROCKSDB__BLOCK_CACHE_SIZE", "3145728"),
        ("PATH", "/bin"),
        ("TIDEGATE_PLUGINS", "/somewhere/of/the/scripts"),
    ];
    let flags = Flags { bind: Some("127.0.0.1:3".parse().unwrap()), ..Flags::default() };
    let config = load(toml, &environment, flags).unwrap();
    assert_eq!(config.http.bind.port(), 3);
    assert_eq!(config.data_dir, PathBuf::from("environment"));
    assert_eq!(config.store.block_cache_size, 3 << 20);
    assert_eq!(config.http.max_connections, 7);
    assert_eq!(config.sql.deadline, Duration::from_millis(100));
    assert_eq!(config.store.write_buffer_size, 8 << 20);
}

#[test]
fn unknown_keys_are_refused_by_full_name() {
    let said = message("[storage.rocksdb]\nblock_cach_size = 1", &[]);
    assert!(said.contains("`storage.rocksdb.block_cach_size`"), "{said}");
    assert!(said.contains("did you mean `storage.rocksdb.block_cache_size`?"), "{said}");
    let said = message("", &[("TIDEGATE_SQL__DEADLINE", "5")]);
    assert!(said.contains("`sql.deadline`") && said.contains("environment"), "{said}");
    let said = message("[[tokens]]\ntoken = '0123456789abcdefg'\nuser = 'a'\nrolle = 'user'", &[]);
    assert!(said.contains("`tokens[0].rolle`"), "{said}");
    assert!(message("nonsense = 1", &[]).contains("`nonsense`"));
}

#[test]
fn values_are_checked() {
    for (toml, expect) in [
        ("[sql]\ndeadline_ms = 60000", "sql.deadline_ms"),
        ("[plugins]\nring_bytes = 100000", "power of two"),
        ("[plugins]\nworker_bytes = 65537", "multiple of 64 KiB"),
        ("[plugins]\nmodule_bytes = '17 MiB'", "plugins.module_bytes"),
        ("[live]\nheartbeat_ms = 'often'", "live.heartbeat_ms"),
        ("[server]\nbind = '0.0.0.0:80'", "--insecure-http"),
        ("[server]\nbind = 'localhost'", "bind"),
        ("[log]\nformat = 'xml'", "xml"),
        ("[audit]\nkeep_records = 0", "audit.keep_records"),
        ("[audit]\nkeep_day = 3", "did you mean `audit.keep_days`?"),
        ("admin_token = 'short'", "at least 32"),
        ("= 1", "TOML"),
    ] {
        let said = message(toml, &[]);
        assert!(said.contains(expect), "{toml}: {said}");
    }
    let open = Flags { insecure_http: true, ..Flags::default() };
    assert!(load("[server]\nbind = '0.0.0.0:80'", &[], open).is_ok());
}

#[test]
fn values_of_another_kind_are_refused_not_converted() {
    for (toml, key, due) in [
        ("[sql]\ndeadline_ms = 1000.7", "`sql.deadline_ms`", "a whole number"),
        ("[server]\nmax_connections = true", "`server.max_connections`", "a whole number"),
        ("[server]\nmax_connections = '5'", "`server.max_connections`", "a whole number"),
        ("[server]\ninsecure_http = 1", "`server.insecure_http`", "true or false"),
        ("[server]\nbody_bytes = 4096.5", "`server.body_bytes`", "8 MiB"),
        ("[server]\nbind = 8433", "`server.bind`", "text"),
        ("data_dir = ['a']", "`data_dir`", "text"),
        ("admin_token = 12345678901234567", "`admin_token`", "text"),
    ] {
        let said = message(toml, &[]);
        assert!(said.contains(key) && said.contains(due), "{toml}: {said}");
        assert!(!said.contains("12345678901234567"), "{said}");
    }
    // A variable is text; what it says is read.
    let variables = [("TIDEGATE_SQL__DEADLINE_MS", "1000"), ("TIDEGATE_SERVER__BODY_BYTES", "2 MiB")];
    let config = load("", &variables, Flags::default()).unwrap();
    assert_eq!((config.sql.deadline.as_millis(), config.http.body_bytes), (1_000, 2 << 20));
    let said = message("[server]\nbody_total_bytes = '1 MiB'\nplugin_body_bytes = '1 MiB'\nbody_bytes = '2 MiB'", &[]);
    assert!(said.contains("server.body_bytes, which is 2097152"), "{said}");
}

#[test]
fn tokens_are_checked_and_never_shown() {
    let entry = |token: &str, user: &str| format!("[[tokens]]\ntoken = '{token}'\nuser = '{user}'\nrole = 'user'\n");
    let config = load(
        &entry(TOKEN, "alice"),
        &[("TIDEGATE_ADMIN_TOKEN", "9876543210987654321098765432109876")],
        Flags::default(),
    );
    let config = config.unwrap();
    assert_eq!(config.tokens[0].user, "alice");
    assert_eq!(config.tokens[0].role, Role::User);
    assert_eq!(config.admin_token.as_deref(), Some("9876543210987654321098765432109876"));
    for (toml, expect) in [
        (entry("tooshort", "a"), "tokens[0].token"),
        (entry("0123456789-changeme", "a"), "sample"),
        (entry("aaaaaaaaaaaaaaaaaaaaaaaa", "a"), "repeated"),
        (entry(TOKEN, ""), "tokens[0].user"),
        (entry(TOKEN, "a").replace("'user'", "'king'"), "tokens[0].role"),
        ("[[tokens]]\nuser = 'a'\nrole = 'user'".to_owned(), "`tokens[0].token`: is missing"),
        (format!("{}{}", entry(TOKEN, "a"), entry(TOKEN, "b")), "used twice"),
        (format!("[[tokens]]\ntoken = '{TOKEN}' oops"), "TOML"),
        (format!("tokens = ['{TOKEN}']"), "[[tokens]]"),
        (format!("tokens = '{TOKEN}'"), "[[tokens]]"),
        (format!("[tokens]\ntoken = '{TOKEN}'"), "[[tokens]]"),
        (format!("[[tokens]]\ntoken = ['{TOKEN}']"), "`tokens[0].token`: has to be text"),
    ] {
        let said = message(&toml, &[]);
        assert!(said.contains(expect), "{toml}: {said}");
        assert!(!said.contains(TOKEN), "a token was shown: {said}");
    }
    let said = message("", &[("TIDEGATE_TOKENS", TOKEN)]);
    assert!(said.contains("[[tokens]]") && !said.contains(TOKEN), "{said}");
}

#[test]
fn defaults_are_valid() {
    let config = Config::new(Path::new("somewhere"));
    assert_eq!(config.http.bind.to_string(), "127.0.0.1:8433");
    assert_eq!(config.live.workers, config.plugins.workers);
}

#[test]
fn every_setting_is_shown_and_no_secret_is() {
    let secret = "a-secret-that-nobody-may-see-0123456789";
    let toml = format!("admin_token = '{secret}-admin'\n[[tokens]]\ntoken = '{secret}'\nuser = 'a'\nrole = 'user'");
    let settings = load(&toml, &[], Flags::default()).unwrap().settings();
    let shown: Vec<String> = settings.iter().map(|(name, _)| name.clone()).collect();
    assert_eq!(shown, raw::all_keys());
    assert!(!format!("{settings:?}").contains(secret));
}
