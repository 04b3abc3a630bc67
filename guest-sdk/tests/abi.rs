//! The calls of ABI 1 against the SDK, natively: the vectors of `vectors/batch.txt`, manifests, and failing rows.

use guest_sdk::change::RawChange;
use guest_sdk::native::{TestTable, Type, Value};
use guest_sdk::output::{OutputValue, Transformed};
use guest_sdk::plugin::{ChangeFilter, ChangeTransform, Describe, Filter, Plugin, Transform};
use guest_sdk::prelude::*;
use guest_sdk::raw::Window;
use guest_sdk::row::ColumnSpec;
use wire::abi::{ColumnType, Configured, DESCRIPTOR_BYTES, Descriptor, ManifestLine, ParamType};
use wire::{ImageBuilder, ImageRef};

#[derive(Params)]
struct Far {
    /// The shortest distance to keep,
    /// in "miles".
    #[param(default = 1000)]
    #[allow(dead_code)]
    miles: i64,
}

#[derive(Row)]
struct Flight<'a> {
    distance: Column<'a, i64>,
}

struct LongHaul;

impl Describe for LongHaul {
    type Params = Far;
    const READS: &'static [ColumnSpec] = Flight::COLUMNS;
}

impl Filter for LongHaul {
    fn keep(params: &Far, row: &Row<'_>) -> Result<bool, String> {
        let by_name = row.get("distance").and_then(|cell| cell.int());
        let flight = Flight::from_row(row);
        assert_eq!(by_name, flight.distance.get());
        assert!(row.get("nowhere").is_none() && row.columns().count() == 3);
        Ok(flight.distance.get().is_some_and(|miles| miles >= params.miles))
    }
}

#[derive(Output)]
struct Halved {
    half: Option<f64>,
    #[column(name = "type")]
    kind: String,
}

struct Halve;

impl Describe for Halve {
    type Params = ();
    const READS: &'static [ColumnSpec] = Flight::COLUMNS;
    const OUTPUT: &'static [(&'static str, Type, bool)] = <Result<Halved, IsNull> as Transformed>::COLUMNS;
}

impl Transform for Halve {
    fn apply((): &(), row: &Row<'_>, image: &mut ImageBuilder) -> Result<(), String> {
        let flight = Flight::from_row(row);
        let halve = || Ok(Halved { half: Some(flight.distance.required()? as f64 / 2.0), kind: "half".into() });
        let halved: Result<Halved, IsNull> = halve();
        Transformed::write(halved, image)
    }
}

/// The window of the vector; its parts lie where the file says, other bytes are anything.
fn window() -> Vec<u8> {
    window_of(include_str!("../vectors/batch.txt"))
}

fn window_of(vector: &str) -> Vec<u8> {
    let mut window = vec![0xaa; 1024];
    let mut at = 0;
    // The last block of the changes is an output, which no window holds.
    for line in vector.lines().take_while(|line| !line.starts_with("output")) {
        match line.split_once(' ') {
            Some(("at", offset)) => at = offset.parse().unwrap(),
            Some(("bytes", hex)) => {
                for byte in hex.split_whitespace() {
                    window[at] = u8::from_str_radix(byte, 16).unwrap();
                    at += 1;
                }
            }
            _ => {}
        }
    }
    window
}

#[test]
fn a_filter_answers_the_vector() {
    let bytes = window();
    let mut plugin = Plugin::<LongHaul>::new();
    let first = Configured::unpack(plugin.configure(Window::over(&bytes), 0)).unwrap();
    let second = Configured::unpack(plugin.configure(Window::over(&bytes), 0)).unwrap();
    assert_eq!((first.handle, first.schema, second.handle), (0, 0, 1));
    assert_eq!(plugin.filter(Window::over(&bytes), first.handle, 256, 4), 1);

    plugin.release(first.handle);
    assert_eq!(plugin.filter(Window::over(&bytes), first.handle, 256, 4), 0, "released");
    assert_eq!(plugin.filter(Window::over(&bytes), second.handle, 256, 65), 0, "too many rows");
    let again = Configured::unpack(plugin.configure(Window::over(&bytes), 0)).unwrap();
    assert_eq!(again.handle, 0, "a released handle is used again");
}

#[test]
fn a_transform_writes_an_image_a_row_and_null_where_it_fails() {
    let bytes = window();
    let mut plugin = Plugin::<Halve>::new();
    let handle = Configured::unpack(plugin.configure(Window::over(&bytes), 0)).unwrap().handle;
    let length = plugin.transform(Window::over(&bytes), handle, 256, 4) >> 32;
    let output = plugin.output();
    assert_eq!(length as usize, output.len());

    let row = |i: usize| {
        let descriptor = Descriptor::from_bytes(output[i * DESCRIPTOR_BYTES..][..DESCRIPTOR_BYTES].try_into().unwrap());
        // Two columns: one length byte and one presence byte in front of the slots' length.
        let (image, at, _) = ImageRef::parse(&output[descriptor.present as usize - 1..]).unwrap();
        assert_eq!(Descriptor::new(at, descriptor.present - 1), descriptor);
        (image.value(0, Type::Double).unwrap(), image.value(1, Type::Text).unwrap())
    };
    let half = Value::Text("half".into());
    assert_eq!(row(0), (Value::Float(544.5), half.clone()));
    assert_eq!(row(1), (Value::Float(499.5), half));
    assert_eq!(row(2), (Value::Null, Value::Null), "distance is NULL: the row failed");
    assert_eq!(row(3), (Value::Null, Value::Null));
}

struct Longer;

impl Describe for Longer {
    type Params = Far;
    const READS: &'static [ColumnSpec] = Flight::COLUMNS;
    const OUTPUT: &'static [(&'static str, Type, bool)] = &[("mile", Type::BigInt, false)];
}

impl ChangeFilter for Longer {
    fn keep(params: &Far, change: &RawChange<'_>) -> Result<bool, String> {
        let change = change.read::<Flight>();
        let Some(new) = change.new() else { return Ok(false) };
        assert_eq!(change.changed(&new.distance), change.changed_named("distance"));
        assert!(!change.changed_named("nowhere"));
        let before = change.old().and_then(|old| old.distance.get());
        assert_eq!(change.changed(&new.distance), before != new.distance.get());
        Ok(change.changed(&new.distance) && new.distance.get().is_some_and(|miles| miles >= params.miles))
    }
}

impl ChangeTransform for Longer {
    /// As many rows as thousands of miles.
    fn expand(_: &Far, change: &RawChange<'_>, row: &mut dyn FnMut(&dyn Fn(&mut ImageBuilder))) -> Result<(), String> {
        let change = change.read::<Flight>();
        for mile in 0..change.row().distance.required().map_err(|e| e.to_string())? / 1000 {
            row(&|image| image.set_int(0, mile));
        }
        if change.op() == Op::Delete { Err("gone".to_string()) } else { Ok(()) }
    }
}

#[test]
fn changes_answer_the_vector() {
    let bytes = window_of(include_str!("../vectors/changes.txt"));
    let mut plugin = Plugin::<Longer>::new();
    let handle = Configured::unpack(plugin.configure(Window::over(&bytes), 0)).unwrap().handle;
    assert_eq!(plugin.filter_changes(Window::over(&bytes), handle, 256, 5), 0b1011);

    plugin.transform_changes(Window::over(&bytes), handle, 256, 5);
    let output = plugin.output();
    let counts: Vec<u32> =
        output[..20].chunks_exact(4).map(|count| u32::from_le_bytes(count.try_into().unwrap())).collect();
    assert_eq!(counts, [1, 1, 1, 1, 0], "what fails becomes no rows, also when it had begun");
    for descriptor in output[20..][..4 * DESCRIPTOR_BYTES].chunks_exact(DESCRIPTOR_BYTES) {
        let descriptor = Descriptor::from_bytes(descriptor.try_into().unwrap());
        let (_, at, _) = ImageRef::parse(&output[descriptor.present as usize - 1..]).unwrap();
        assert_eq!(Descriptor::new(at, descriptor.present - 1), descriptor);
    }
}

#[test]
fn changes_are_tested_natively() {
    #[filter]
    fn longer(change: &Change<Flight>) -> bool {
        matches!((change.old(), change.new()), (Some(old), Some(new)) if new.distance.get() > old.distance.get())
    }
    let table = TestTable::new::<Flight>(&[("id", Type::Int), ("distance", Type::Int)]).unwrap();
    let kept = |old: Option<&[Value]>, new: Option<&[Value]>| table.change(old, new).read(|raw| longer(&raw.read()));
    let (short, long) = ([Value::Int(1), Value::Int(5)], [Value::Int(1), Value::Int(6)]);
    assert!(kept(Some(&short), Some(&long)) && !kept(Some(&long), Some(&short)) && !kept(None, Some(&long)));
    table.change(Some(&short), Some(&long)).read(|raw| {
        let change: Change<Row> = raw.read();
        assert!(change.changed_named("distance") && !change.changed_named("id"));
        assert_eq!(change.op(), Op::Update);
    });
}

#[test]
fn configure_refuses_what_does_not_fit() {
    let refused = |at: usize, byte: u8| {
        let mut bytes = window();
        bytes[at] = byte;
        Plugin::<LongHaul>::new().configure(Window::over(&bytes), 0) == Configured::FAILED
    };
    assert!(!refused(0, 33), "nothing changed");
    assert!(refused(33, 0), "the required parameter is NULL");
    assert!(refused(20, 2), "two columns for one");
    assert!(refused(46, 4), "a text for an int");
    assert!(refused(48, 200), "the schema is truncated");
}

#[test]
#[should_panic(expected = "outside the window")]
fn an_offset_outside_the_window_ends_in_a_panic() {
    let mut bytes = window();
    let mut plugin = Plugin::<LongHaul>::new();
    plugin.configure(Window::over(&bytes), 0);
    bytes[260..264].copy_from_slice(&1024u32.to_le_bytes());
    plugin.filter(Window::over(&bytes), 0, 256, 4);
}

#[derive(Params)]
struct Everything {
    #[param(default = true)]
    r#type: bool,
    #[param(default = -5)]
    count: i64,
    #[param(default = -1.)]
    ratio: f64,
    #[param(default = "a \"b\"\n")]
    text: String,
    missing: Option<String>,
    required: f64,
}

#[derive(Row)]
#[allow(dead_code)]
struct Columns<'a> {
    a: Column<'a, bool>,
    b: Column<'a, i64>,
    c: Column<'a, f64>,
    d: Column<'a, Number>,
    e: Column<'a, Decimal>,
    f: Column<'a, &'a str>,
    g: Column<'a, &'a [u8]>,
    h: Column<'a, Uuid>,
    i: Column<'a, Cell<'a>>,
    j: Column<'a, Timestamp>,
    #[column(name = "K k", optional)]
    k: Column<'a, Date>,
}

fn lines(parts: &[&str]) -> Vec<ManifestLine> {
    parts.concat().lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"))).collect()
}

#[test]
fn manifest_lines_are_what_the_host_reads() {
    let param = |name: &str, r#type, default: Option<&str>, doc: Option<&str>| ManifestLine::Param {
        name: name.into(),
        r#type,
        default: default.map(Into::into),
        doc: doc.map(Into::into),
    };
    let doc = "The shortest distance to keep, in \"miles\".";
    assert_eq!(lines(Far::MANIFEST), [param("miles", ParamType::Int, Some("1000"), Some(doc))]);
    let expected = [
        param("type", ParamType::Bool, Some("true"), None),
        param("count", ParamType::Int, Some("-5"), None),
        param("ratio", ParamType::Float, Some("-1.0"), None),
        param("text", ParamType::Text, Some(r#""a \"b\"\n""#), None),
        param("missing", ParamType::Text, Some("null"), None),
        param("required", ParamType::Float, None, None),
    ];
    assert_eq!(lines(Everything::MANIFEST), expected);

    let types = [
        ColumnType::Bool,
        ColumnType::Int,
        ColumnType::Float,
        ColumnType::Number,
        ColumnType::Decimal,
        ColumnType::Text,
        ColumnType::Bytes,
        ColumnType::Uuid,
        ColumnType::Any,
        ColumnType::Int,
        ColumnType::Int,
    ];
    for (i, (line, ty)) in lines(Columns::MANIFEST).into_iter().zip(types).enumerate() {
        let ManifestLine::Column { name, r#type, optional } = line else { panic!("not a column: {line:?}") };
        assert_eq!((r#type, optional), (ty, i == 10), "column {name}");
        assert_eq!(name, if i == 10 { "K k".to_string() } else { char::from(b'a' + i as u8).to_string() });
    }
}

#[test]
fn every_parameter_kind_is_read() {
    let mut image = ImageBuilder::new(6);
    let values = [Value::Bool(true), Value::Int(-5), Value::Float(2.5), Value::Text("é".into()), Value::Null];
    for (i, value) in values.iter().enumerate() {
        image.set(i as u16, value);
    }
    image.set_float(5, f64::INFINITY);
    let mut bytes = vec![0; 48];
    let at = image.finish_into(&mut bytes);
    bytes[..16].copy_from_slice(&Descriptor::new(at, 48).to_bytes());
    // No columns are read; the schema is the zero byte at 32, which is the empty one.
    bytes[24..32].copy_from_slice(&[32, 0, 0, 0, 1, 0, 0, 0]);

    struct Checks;
    impl Describe for Checks {
        type Params = Everything;
        const READS: &'static [ColumnSpec] = &[];
    }
    impl Filter for Checks {
        fn keep(params: &Everything, _: &Row<'_>) -> Result<bool, String> {
            assert!(params.r#type && params.count == -5 && params.ratio == 2.5 && params.text == "é");
            Ok(params.missing.is_none() && params.required.is_infinite())
        }
    }
    let mut plugin = Plugin::<Checks>::new();
    assert_ne!(plugin.configure(Window::over(&bytes), 0), Configured::FAILED);
    assert_eq!(plugin.filter(Window::over(&bytes), 0, 0, 1), 1);
}

#[test]
fn output_columns_have_the_types_of_sql() {
    fn of<T: OutputValue>() -> (Type, bool) {
        (T::TYPE, T::NULLABLE)
    }
    assert_eq!(of::<i16>(), (Type::SmallInt, false));
    assert_eq!(of::<i32>(), (Type::Int, false));
    assert_eq!(of::<Option<i64>>(), (Type::BigInt, true));
    assert_eq!(of::<f32>(), (Type::Real, false));
    assert_eq!(of::<Option<&[u8]>>(), (Type::Bytea, true));
    assert_eq!(of::<Timestamp>(), (Type::Timestamp, false));
    assert_eq!(<Halved as Transformed>::COLUMNS, [("half", Type::Double, true), ("type", Type::Text, false)]);
}
