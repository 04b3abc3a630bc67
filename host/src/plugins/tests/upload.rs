//! What an upload is refused for, and that the reason says what to do.

use super::*;

#[test]
fn refusals_name_what_and_the_limit() {
    let fixture = Fixture::new(options());
    let good = wat::parse_str(at_least()).unwrap();
    let without = |export: &str| at_least().replace(&format!("(export \"{export}\")"), "");
    let with =
        |more: &str| at_least().replace("(func (export \"tg_abi\")", &format!("{more} (func (export \"tg_abi\")"));
    let manifest = |line: &str| {
        guest(
            &[line],
            &format!("{CONFIGURE} (func (export \"tg_filter\") (param i32 i32 i32) (result i64) (i64.const 0))"),
        )
    };
    let component = b"\0asm\x0d\0\x01\0".to_vec();
    for (upload, expected) in [
        (Vec::new(), "the upload is empty"),
        (b"\xff\xfe".to_vec(), "and no WAT text, which is UTF-8"),
        (b"(module".to_vec(), "the WAT text does not parse"),
        (component, "component"),
        (good[..good.len() - 3].to_vec(), "not valid WebAssembly"),
        (good[..8].to_vec(), "does not export its memory"),
        (
            // Text may have twice as much.
            vec![b' '; (8 << 20) + 1],
            "the upload has 8388609 bytes; at most 8388608 are allowed; raise plugins.module_bytes",
        ),
        (
            [&good[..8], &vec![0; 4 << 20]].concat(),
            "the upload has 4194312 bytes; at most 4194304 are allowed; raise plugins.module_bytes",
        ),
        (without("tg_window").into(), "does not export `tg_window`, which ABI 1 needs"),
        (without("tg_filter").into(), "exports neither `tg_filter` nor `tg_transform`"),
        (without("memory").into(), "does not export its memory"),
        (
            with("(func (export \"tg_transform\") (param i32 i32 i32) (result i64) (i64.const 0))").into(),
            "exports both",
        ),
        (
            at_least()
                .replace(
                    "(func (export \"tg_abi\") (result i32) (i32.const 1))",
                    "(func (export \"tg_abi\") (result i64) (i64.const 1))",
                )
                .into(),
            "export `tg_abi` is () -> (i64); ABI 1 has () -> (i32)",
        ),
        (
            at_least().replace("(result i32) (i32.const 1))", "(result i32) (i32.const 2))").into(),
            "built for plugin ABI 2; this server speaks ABI 1",
        ),
        (
            with("(import \"wasi_snapshot_preview1\" \"fd_write\" (func (param i32)))")
                .replace("(memory", "\n(memory")
                .into(),
            "parse",
        ),
        (
            at_least().replace("\"tidegate\" \"log\"", "\"env\" \"abort\"").into(),
            "imports `env.abort`, which is not there",
        ),
        (
            at_least().replace("(param i32 i32 f64)", "(param i32 i32 f32)").into(),
            "import `tidegate.metric` is (i32, i32, f32) -> ()",
        ),
        (
            at_least().replace("(memory (export \"memory\") 2)", "(memory (export \"memory\") 100)").into(),
            "the declared memory has 6553600 bytes; at most 4194304",
        ),
        (at_least().replace("(memory (export \"memory\") 2)", "(memory (export \"memory\") 2 3)").into(), "tg_window"),
        (
            at_least().replace("(memory (export \"memory\") 2)", "(memory (export \"memory\") i64 2)").into(),
            "not valid WebAssembly",
        ),
        (with("(memory 1)").into(), "memories"),
        (with("(table 30000 funcref)").into(), "a table has 30000 elements; at most 20000"),
        (with("(table 1 funcref) (table 1 funcref) (table 1 funcref)").into(), "3 tables; at most 2"),
        (with(&format!("(func (local {}))", "i32 ".repeat(2001))).into(), "2001 locals; at most 2000"),
        (with(&format!("(func {})", "nop ".repeat(140_000))).into(), "a function's body has"),
        (with(&"(global i32 (i32.const 0))".repeat(5_001)).into(), "globals; at most 5000"),
        (with("(tag $t)").into(), "not valid WebAssembly"),
        (with("(func (result externref) unreachable)").into(), "not valid WebAssembly"),
        (
            manifest(r#"{"plugin":{"abi":7}}"#).into(),
            "line 1 of the manifest: the module is built for plugin ABI 7; this server speaks ABI 1",
        ),
        (manifest(r#"{"plugin":{"abi":1,"colour":"red"}}"#).into(), "line 1 of the manifest: unknown field `colour`"),
        (
            manifest(r#"{"plugin":{"abi":1,"kind":"change_transform"}}"#).into(),
            "the manifest says that the plugin is a change_transform, but the module exports `tg_filter`",
        ),
        (manifest(r#"{"secret":{}}"#).into(), "unknown variant `secret`"),
        (
            manifest(r#"{"param":{"name":"m","type":"int","default":"x"}}"#).into(),
            "the default of parameter `m` is not JSON",
        ),
        (manifest(r#"{"param":{"name":"m","type":"int","default":"\"x\""}}"#).into(), "has to be an int"),
        (manifest(&"x".repeat(65 * 1024)).into(), "the manifest has 66561 bytes; at most 65536"),
    ] {
        match fixture.plugins.inspect(&upload) {
            Err(PluginError::Refused(message)) => {
                assert!(message.contains(expected), "expected `{expected}`, got `{message}`")
            }
            other => panic!("{expected}: {other:?}"),
        }
    }
}

#[test]
fn a_good_upload_is_described() {
    let fixture = Fixture::new(options());
    let inspected = fixture.plugins.inspect(at_least().as_bytes()).unwrap();
    assert_eq!((inspected.kind, inspected.abi, inspected.manifest.len()), (PluginKind::RowFilter, 1, 3));
    assert_eq!(inspected.sha256.len(), 64);
    let again = fixture.plugins.inspect(&inspected.wasm).unwrap();
    assert_eq!(again.sha256, inspected.sha256, "text and binary are the same plugin");
    assert_eq!(fixture.plugins.inspect(plus(None).as_bytes()).unwrap().kind, PluginKind::RowTransform);
    // Without a manifest: no parameters, no columns.
    let bare = guest(
        &[],
        &format!("{CONFIGURE} (func (export \"tg_filter\") (param i32 i32 i32) (result i64) (i64.const 0))"),
    );
    assert!(fixture.plugins.inspect(bare.as_bytes()).unwrap().manifest.is_empty());
    assert_eq!(fixture.metrics.plugin_instances.get(), 0);
}

#[test]
fn a_manifest_is_put_into_a_module() {
    let wasm = wat::parse_str(at_least()).unwrap();
    let manifest = "{\"plugin\":{\"abi\":1,\"name\":\"other\"}}\n";
    let once = check::attach(&options(), &wasm, manifest).unwrap();
    let twice = check::attach(&options(), &once, manifest).unwrap();
    assert_eq!(once, twice, "the manifest before is taken out");
    // As llvm-objcopy writes a section: its length in five bytes, whatever it is.
    let name = wire::abi::MANIFEST_SECTION;
    let content = [&[name.len() as u8], name.as_bytes(), b"{}"].concat();
    let head = [0, content.len() as u8 | 0x80, 0x80, 0x80, 0x80, 0];
    let padded = [&wasm[..8], &head, &content, &wasm[8..], &head, &content].concat();
    assert_eq!(check::attach(&options(), &padded, manifest).unwrap(), once, "however long its length is written");
    let fixture = Fixture::new(options());
    let inspected = fixture.plugins.inspect(&once).unwrap();
    assert_eq!(inspected.manifest.len(), 1);
    // Its two pages; the window is not its own.
    assert_eq!(inspected.measured.instance_bytes, 2 * 64 * 1024);
    assert!(inspected.measured.compile_time.is_some());
    let error = check::attach(&options(), &wasm, "{}").unwrap_err().to_string();
    assert!(error.contains("line 1 of the manifest"), "{error}");
}

#[test]
fn compiled_code_is_kept_and_never_loaded_when_it_was_touched() {
    let folder = tempfile::tempdir().unwrap();
    let kept = PluginOptions { cache_dir: Some(folder.path().to_owned()), ..options() };
    let sha256 = Fixture::new(kept.clone()).plugins.inspect(at_least().as_bytes()).unwrap().sha256;
    let again = Fixture::new(kept.clone()).plugins.inspect(at_least().as_bytes()).unwrap();
    assert_eq!(again.measured.compile_time, None, "nothing was compiled");
    let files = || std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let [file] = &files()[..] else { panic!("{:?}", files()) };
    assert!(file.file_name().unwrap().to_str().unwrap().starts_with(&sha256));
    // Too short a time to compile in: what works came from the file.
    let hurried = PluginOptions { compile_time: Duration::from_micros(1), ..kept.clone() };
    let works = |fixture: Fixture| {
        let stage = fixture.unchecked("at_least", &at_least());
        open(&mut fixture.plugins.worker(0), &[stage]).map(drop).map_err(|error| error.to_string())
    };
    works(Fixture::new(hurried.clone())).unwrap();
    let whole = std::fs::read(file).unwrap();
    for at in [0, 40, whole.len() / 2, whole.len() - 1] {
        let mut touched = whole.clone();
        touched[at] ^= 0x10;
        std::fs::write(file, touched).unwrap();
        let error = works(Fixture::new(hurried.clone())).unwrap_err();
        assert!(error.contains("compile"), "{error}");
        assert!(!file.exists(), "it is not looked at again");
    }
    works(Fixture::new(kept)).unwrap();
    assert_eq!(std::fs::read(file).unwrap(), whole);
}

#[test]
fn compiling_has_a_limit() {
    let fixture = Fixture::new(PluginOptions { compile_time: Duration::from_micros(1), ..options() });
    let error = fixture.plugins.inspect(at_least().as_bytes()).unwrap_err().to_string();
    assert!(error.contains("compile"), "{error}");
}

#[test]
fn pipelines_are_checked_before_they_are_opened() {
    let fixture = Fixture::new(options());
    let stage = |params: &str| fixture.stage("at_least", &at_least(), params);
    let check = |stages: &[Stage], input: &Schema| {
        fixture.plugins.check(NS, stages, input, OnError::Stop).unwrap_err().to_string()
    };
    let message = check(&[stage(r#"{"max":3}"#)], &table());
    assert_eq!(message, "plugin at_least: there is no parameter `max`; it takes min (an int, default 10)");
    let message = check(&[stage(r#"{"min":"3"}"#)], &table());
    assert!(message.contains("parameter `min` has to be an int, not \"3\""), "{message}");
    let other = Schema { columns: vec![column(0, "id", Type::BigInt), column(1, "name", Type::Text)] };
    let message = check(&[stage("")], &other);
    assert!(
        message.contains(
            "reads column `v` (an integer, DATE, TIME or TIMESTAMP), which its input does not have; there are id, name"
        ),
        "{message}"
    );
    // The second stage sees the first one's output.
    let named = filter(&[r#"{"column":{"name":"name","type":"text"}}"#], "(i32.const 1)");
    let message = check(&[fixture.stage("plus", &plus(None), ""), fixture.stage("named", &named, "")], &table());
    assert!(
        message.contains("plugin named reads column `name` (TEXT or JSON), which its input does not have; there are v"),
        "{message}"
    );

    // Only a transform has an output schema.
    let schema = "(func (export \"tg_configure\") (param i32) (result i64) (i64.const 0x4000000001))";
    let error = fixture.plugins.inspect(once("").replace(CONFIGURE, schema).as_bytes()).unwrap_err();
    let expected = "(abi): tg_configure answered 0x40 in its high 32 bits, which are 0 for a filter";
    assert!(matches!(&error, PluginError::Refused(message) if message.ends_with(expected)), "{error}");

    let picky = once("").replace(CONFIGURE, "(data (i32.const 8) \"not today\") (func (export \"tg_configure\") (param i32) (result i64) (call $fail (i32.const -1) (i32.const 8) (i32.const 9)) (i64.const -1))");
    let stage = fixture.stage("picky", &picky, "");
    match fixture.plugins.check(NS, &[stage], &table(), OnError::Stop) {
        Err(StageError { error: PluginError::Params(message), .. }) => assert_eq!(message, "plugin picky: not today"),
        other => panic!("{other:?}"),
    }
}
