//! The command line against a server, as somebody would type it.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tests::{PATIENCE, TestServer, plugin, server};

/// `tidegate` with these arguments, in a folder, as the administrator.
pub fn tidegate(server: &TestServer, folder: &Path, arguments: &[&str]) -> Output {
    tidegate_fed(server, folder, arguments, "")
}

fn tidegate_fed(server: &TestServer, folder: &Path, arguments: &[&str], stdin: &str) -> Output {
    let mut command = Command::new(server::binary());
    command.args(arguments).current_dir(folder);
    command.env("TIDEGATE_URL", server.admin().url("")).env("TIDEGATE_TOKEN", server::ADMIN_TOKEN);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("tidegate starts");
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[track_caller]
pub fn said(output: Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}\n{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

#[track_caller]
fn complained(output: Output) -> String {
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sql_live_and_plugins_from_a_shell() {
    let server = TestServer::start().await;
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| tidegate(&server, folder.path(), arguments);
    said(run(&["sql", "CREATE TABLE t (id INT PRIMARY KEY, dep_delay INT)"]));
    assert_eq!(said(run(&["sql", "INSERT INTO t VALUES (1, 50), (2, $1)", "--params", "[5]"])), "2 rows changed\n");
    let table = said(tidegate_fed(&server, folder.path(), &["sql", "-"], "SELECT * FROM t ORDER BY id"));
    assert_eq!(table, "id  dep_delay\n--  ---------\n1   50\n2   5\n(2 rows)\n");
    assert!(complained(run(&["sql", "SELECT nothing FROM t"])).contains("nothing"));

    std::fs::write(folder.path().join("late.wasm"), plugin("late.wasm")).unwrap();
    let pushed = said(run(&["plugin", "push", "late.wasm"]));
    assert!(
        pushed.starts_with("late version 1: row_filter") && pushed.contains("minutes (int, default 15)"),
        "{pushed}"
    );
    for told in ["bytes, sha256", "reads: dep_delay", "compiled in", "KiB of memory beside its window", " ns a change"]
    {
        assert!(pushed.contains(told), "{told}: {pushed}");
    }
    let pushed = |more: &[&str]| -> Value {
        let arguments = [&["plugin", "push", "late.wasm", "--json"][..], more].concat();
        serde_json::from_str(&said(run(&arguments[..]))).unwrap()
    };
    let answer = pushed(&["--table", "t", "--params", r#"{"minutes":30}"#]);
    assert_eq!(
        (&answer["unchanged"], &answer["compile_ms"]),
        (&json!(true), &Value::Null),
        "compiled before: {answer}"
    );
    assert!(answer["instance_bytes"].as_u64().is_some_and(|bytes| bytes > 0 && bytes % 65_536 == 0), "{answer}");
    assert!(answer["nanos_per_change"].as_f64().is_some_and(|nanos| nanos > 0.0), "{answer}");
    assert!(answer["upload_ms"].is_u64() && answer["size"].is_u64(), "{answer}");
    assert_eq!(answer["columns"][0]["name"], "dep_delay");
    // What cannot be measured is pushed nevertheless, and says why.
    for (more, why) in [(["--table", "nowhere"], "nowhere"), (["--params", r#"{"hours":1}"#], "hours")] {
        let answer = pushed(&more);
        assert_eq!(answer["nanos_per_change"], Value::Null);
        assert!(answer["not_measured"].as_str().is_some_and(|reason| reason.contains(why)), "{answer}");
    }
    let tried = said(run(&["plugin", "try", "late", "--rows", r#"[{"dep_delay":15},{"dep_delay":1}]"#]));
    assert!(tried.contains(r#"0  {"keep":true}"#) && tried.contains(r#"1  {"keep":false}"#), "{tried}");
    let live = said(run(&["live", "SELECT id FROM t", "--plugin", "late", "--once", "--json"]));
    let events: Vec<Value> = live.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let names: Vec<&str> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(names, ["start", "insert", "uptodate"], "{live}");
    assert!(said(run(&["plugin", "list"])).contains("late"));
    assert!(said(run(&["plugin", "show", "late"])).contains("(active)"));
    assert_eq!(said(run(&["plugin", "errors", "late"])), "none\n");
    assert!(complained(run(&["plugin", "replay", "late", "1"])).contains("no noted failure 1"));
    assert_eq!(said(run(&["plugin", "logs", "late"])), "", "it says nothing");
    assert!(complained(run(&["plugin", "logs", "nobody"])).contains("nobody"));
    assert!(complained(run(&["plugin", "errors", "nobody"])).contains("nobody"));
    assert!(complained(run(&["plugin", "rollback", "late"])).contains("no earlier version"));
    // What is missing is named as it is typed here.
    std::fs::write(folder.path().join("worse.wasm"), plugin("worse.wasm")).unwrap();
    said(run(&["plugin", "push", "worse.wasm", "--name", "late"]));
    said(run(&["plugin", "rollback", "late"]));
    assert!(complained(run(&["plugin", "rollback", "late"])).contains("say which (--version)"));
    std::fs::write(folder.path().join("late.c"), "int late;").unwrap();
    assert!(complained(run(&["plugin", "push", "late.c"])).contains("build it first"));
    // The one that read its stream has gone; the server sees that in its own time.
    let db = server.admin();
    let gone = async { while db.metric("tidegate_subscriptions").await > 0.0 {} };
    tokio::time::timeout(PATIENCE, gone).await.expect("who has gone is forgotten");
    said(run(&["plugin", "rm", "late"]));
    assert!(complained(run(&["plugin", "show", "late"])).contains("not_found"));
    let nobody = complained(run(&["plugin", "list", "--token", "not-a-token-of-this-server"]));
    assert!(nobody.contains("401") && nobody.contains("--token"), "{nobody}");
    let nowhere = complained(run(&["plugin", "list", "--url", "http://127.0.0.1:1"]));
    assert!(nowhere.contains("no server answers at 127.0.0.1:1"), "{nowhere}");
}

#[tokio::test]
async fn a_manifest_is_attached_and_a_module_runs_without_a_server() {
    let server = TestServer::start().await;
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| tidegate(&server, folder.path(), arguments);
    std::fs::write(folder.path().join("late.wasm"), plugin("late.wasm")).unwrap();
    let manifest = r#"{"plugin":{"abi":1,"name":"renamed"}}
{"param":{"name":"minutes","type":"int","default":"7"}}
{"column":{"name":"dep_delay","type":"number"}}
"#;
    std::fs::write(folder.path().join("manifest.jsonl"), manifest).unwrap();
    said(run(&["plugin", "attach", "late.wasm", "--manifest", "manifest.jsonl", "-o", "renamed.wasm"]));
    let requests = [
        json!({"module": "renamed.wasm", "rows": [{"dep_delay": 7}, {"dep_delay": 6.5}, {"dep_delay": null}]}),
        json!({"module": "renamed.wasm", "columns": [{"name": "dep_delay", "type": "DECIMAL(6,2)"}], "rows": [{"dep_delay": "7.01"}]}),
        json!({"module": "renamed.wasm", "params": {"hours": 1}}),
        json!({"module": "nowhere.wasm"}),
        json!({"modul": "x"}),
        json!({"module": "renamed.wasm", "rows": [{"dep_delay": "2013-01-01"}]}),
    ];
    let requests: String = requests.iter().map(|request| format!("{request}\n")).collect();
    let answers = said(tidegate_fed(&server, folder.path(), &["plugin", "exec", "--stdio"], &requests));
    let answers: Vec<Value> = answers.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers[0]["results"], json!([{"keep": true}, {"keep": false}, {"keep": false}]), "{:?}", answers[0]);
    assert_eq!(answers[1]["results"], json!([{"keep": true}]));
    for (answer, named) in answers[2..].iter().zip(["hours", "nowhere.wasm", "modul", ".columns("]) {
        assert!(answer["problem"]["detail"].as_str().unwrap().contains(named), "{answer}");
    }
    // Text stays as it is: the module goes beside it.
    let text = plugin("long_haul.wat");
    std::fs::write(folder.path().join("far.wat"), &text).unwrap();
    let manifest = r#"{"plugin":{"abi":1,"name":"far"}}
{"param":{"name":"miles","type":"int","default":"3"}}
{"column":{"name":"distance","type":"int"}}"#;
    std::fs::write(folder.path().join("far.jsonl"), manifest).unwrap();
    assert!(said(run(&["plugin", "attach", "far.wat", "--manifest", "far.jsonl"])).starts_with("far.wasm: "));
    assert_eq!(std::fs::read(folder.path().join("far.wat")).unwrap(), text);
    said(run(&["plugin", "push", "far.wasm"]));
    let tried = said(run(&["plugin", "try", "far", "--rows", r#"[{"distance":3}]"#]));
    assert!(tried.contains(r#"0  {"keep":true}"#) && tried.contains("\n1 row in "), "{tried}");
    std::fs::write(folder.path().join("bad.jsonl"), "{\"plugin\":{\"abi\":9}}").unwrap();
    let refused = complained(run(&["plugin", "attach", "late.wasm", "--manifest", "bad.jsonl"]));
    assert!(refused.contains("line 1 of the manifest"), "{refused}");
}

/// One of them was taken, and nothing said which.
#[test]
fn a_workspace_of_several_plugins_is_not_one() {
    let folder = tempfile::tempdir().unwrap();
    let write = |file: &str, text: &str| {
        let path = folder.path().join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write("Cargo.toml", "[workspace]\nresolver = \"3\"\nmembers = [\"one\", \"two\"]\n");
    for name in ["one", "two"] {
        let manifest = "version = \"0.1.0\"\nedition = \"2024\"\n[lib]\ncrate-type = [\"cdylib\"]\n";
        write(&format!("{name}/Cargo.toml"), &format!("[package]\nname = \"{name}\"\n{manifest}"));
        write(&format!("{name}/src/lib.rs"), "");
    }
    let run = |arguments: &[&str]| {
        let mut command = Command::new(server::binary());
        command.args(arguments).current_dir(folder.path()).env("CARGO_TARGET_DIR", folder.path().join("target"));
        command.output().unwrap()
    };
    let refused = complained(run(&["plugin", "build"]));
    assert!(refused.contains("several plugins (one, two)") || refused.contains("(two, one)"), "{refused}");
    assert!(said(run(&["plugin", "build", "two"])).starts_with("two/two.wasm"));
}

/// What a newcomer types first. The crates of all kinds share a target folder, so their dependencies are built once.
#[test]
fn a_new_crate_of_each_kind_passes_its_own_test() {
    let folder = tempfile::tempdir().unwrap();
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(server::binary());
        command.args(arguments).current_dir(folder.path());
        command.env("CARGO_TARGET_DIR", Path::new(env!("CARGO_TARGET_TMPDIR")).join("new_crates"));
        command.output().unwrap()
    };
    let sdk = tree.join("guest-sdk").display().to_string();
    for kind in ["filter", "transform", "change-filter", "change-transform"] {
        let name = format!("new_{}", kind.replace('-', "_"));
        said(run(&["plugin", "new", &name, "--kind", kind, "--sdk", &sdk]));
        // Versions that this machine has: the test asks no registry.
        std::fs::copy(tree.join("Cargo.lock"), folder.path().join(&name).join("Cargo.lock")).unwrap();
        let tested = said(run(&["plugin", "test", &name]));
        assert!(tested.contains("it_works_on_the_engine ... ok"), "{tested}");
    }
    let nowhere = complained(run(&["plugin", "test", "nowhere"]));
    assert!(nowhere.contains("no Cargo.toml"), "{nowhere}");
}
