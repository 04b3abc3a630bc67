use std::collections::HashMap;
use std::sync::Arc;
use wire::Type;

use arrow::array::*;

use super::*;

/// Column values as JSON, one text per row.
fn shown(array: ArrayRef, sql_type: Option<&str>) -> Vec<String> {
    let mut field = Field::new("c", array.data_type().clone(), true);
    if let Some(ty) = sql_type {
        field = field.with_metadata(HashMap::from([(SQL_TYPE.to_owned(), ty.to_owned())]));
    }
    let rows = array.len();
    let batch = RecordBatch::try_new(Arc::new(Schema::new(vec![field])), vec![array]).unwrap();
    let writer = Rows::new(&batch).unwrap();
    (0..rows).map(|row| write(|out| writer.value(0, row, out))).collect()
}

fn write(write: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut out = Vec::new();
    write(&mut out);
    let text = String::from_utf8(out).unwrap();
    serde_json::from_str::<serde_json::Value>(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
    assert!(!text.contains(['\n', '\r']), "{text}");
    text
}

fn check(array: impl Array + 'static, expect: &[&str]) {
    assert_eq!(shown(Arc::new(array), None), expect);
}

#[test]
fn numbers() {
    let edge = 1_i64 << 53;
    check(
        Int64Array::from(vec![Some(0), None, Some(edge), Some(edge + 1), Some(-edge), Some(-edge - 1), Some(i64::MIN)]),
        &[
            "0",
            "null",
            "9007199254740992",
            "\"9007199254740993\"",
            "-9007199254740992",
            "\"-9007199254740993\"",
            "\"-9223372036854775808\"",
        ],
    );
    check(UInt64Array::from(vec![7, u64::MAX]), &["7", "\"18446744073709551615\""]);
    check(Int16Array::from(vec![-3]), &["-3"]);
    check(
        Float64Array::from(vec![1.0, 0.1, -0.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e300]),
        &["1.0", "0.1", "-0.0", "\"NaN\"", "\"Infinity\"", "\"-Infinity\"", "1e+300"],
    );
    check(Float32Array::from(vec![0.1]), &["0.1"]);
    let decimals = Decimal128Array::from(vec![Some(-12_345), Some(5), None]).with_precision_and_scale(10, 2).unwrap();
    check(decimals, &["\"-123.45\"", "\"0.05\"", "null"]);
    check(BooleanArray::from(vec![Some(true), Some(false), None]), &["true", "false", "null"]);
}

#[test]
fn text_bytes_and_json() {
    check(
        StringArray::from(vec!["a\"b\\", "line\r\nid: 7\u{2028}", "\0é"]),
        &[r#""a\"b\\""#, "\"line\\r\\nid: 7\u{2028}\"", "\"\\u0000é\""],
    );
    check(
        StringViewArray::from(vec!["a long enough string to live outside"]),
        &["\"a long enough string to live outside\""],
    );
    check(BinaryArray::from(vec![&b"\x00\xff"[..]]), &["\"AP8=\""]);
    let json = StringArray::from(vec![Some("{\"a\":\n[1,2]}"), Some("not json"), None, Some("\"x\\n\"")]);
    assert_eq!(shown(Arc::new(json), Some("json")), ["{\"a\": [1,2]}", "\"not json\"", "null", "\"x\\n\""]);
    let uuid = FixedSizeBinaryArray::try_from_iter([[0x11_u8; 16]].iter()).unwrap();
    assert_eq!(shown(Arc::new(uuid.clone()), Some("UUID")), ["\"11111111-1111-1111-1111-111111111111\""]);
    check(uuid, &["\"EREREREREREREREREREREQ==\""]);
}

#[test]
fn days_and_times() {
    check(Date32Array::from(vec![15_706]), &["\"2013-01-01\""]);
    check(Time64MicrosecondArray::from(vec![18_900_000_001]), &["\"05:15:00.000001\""]);
    check(TimestampMicrosecondArray::from(vec![-1]).with_timezone("UTC"), &["\"1969-12-31T23:59:59.999999Z\""]);
    check(TimestampSecondArray::from(vec![0]), &["\"1970-01-01T00:00:00.000000Z\""]);
    check(TimestampNanosecondArray::from(vec![1_000]), &["\"1970-01-01T00:00:00.000001Z\""]);
}

#[test]
fn nested_and_encoded() {
    let list = ListArray::from_iter_primitive::<Int32Type, _, _>(vec![Some(vec![Some(1), None]), None, Some(vec![])]);
    check(list, &["[1,null]", "null", "[]"]);
    let fields = vec![
        (Arc::new(Field::new("a", DataType::Int32, true)), Arc::new(Int32Array::from(vec![1])) as ArrayRef),
        (Arc::new(Field::new("b\"", DataType::Utf8, true)), Arc::new(StringArray::from(vec!["x"])) as ArrayRef),
    ];
    check(StructArray::from(fields), &["{\"a\":1,\"b\\\"\":\"x\"}"]);
    let dictionary: DictionaryArray<Int32Type> = vec![Some("a"), None, Some("a")].into_iter().collect();
    check(dictionary, &["\"a\"", "null", "\"a\""]);
    check(NullArray::new(1), &["null"]);
}

#[test]
fn rows_as_arrays_and_objects() {
    let schema =
        Schema::new(vec![Field::new("id", DataType::Int64, false), Field::new("na\nme", DataType::Utf8, true)]);
    let columns: Vec<ArrayRef> =
        vec![Arc::new(Int64Array::from(vec![1, 2])), Arc::new(StringArray::from(vec![Some("a"), None]))];
    let batch = RecordBatch::try_new(Arc::new(schema), columns).unwrap();
    let rows = Rows::new(&batch).unwrap();
    assert_eq!(write(|out| rows.array(0, out)), r#"[1,"a"]"#);
    assert_eq!(write(|out| rows.object(1, out)), r#"{"id":2,"na\nme":null}"#);
}

#[test]
fn type_names() {
    assert_eq!(Type::Decimal { precision: 10, scale: 2 }.to_string(), "DECIMAL(10,2)");
    assert_eq!(Type::BigInt.to_string(), "BIGINT");
}

proptest::proptest! {
    /// Whatever the values, the document is valid and reads back the same.
    #[test]
    fn strings_come_back(values in proptest::collection::vec(".*", 1..8)) {
        let expect: Vec<serde_json::Value> = values.iter().cloned().map(serde_json::Value::from).collect();
        for (text, expect) in shown(Arc::new(StringArray::from(values)), None).iter().zip(expect) {
            proptest::prop_assert_eq!(serde_json::from_str::<serde_json::Value>(text).unwrap(), expect);
        }
    }
}
