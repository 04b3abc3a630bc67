//! The vectors that guests in other languages test themselves with, held against this crate.

use wire::abi::{
    CHANGE_DESCRIPTOR_BYTES, CONFIGURE_BYTES, ChangeDescriptor, Configure, Configured, DESCRIPTOR_BYTES, Descriptor,
    Read, decode_schema, encode_schema,
};
use wire::{ColumnDecl, ImageBuilder, ImageRef, Kind, Schema, Type, Value};

/// One block: its lines as (first word, rest) without the bytes, and the bytes.
struct Block<'t> {
    lines: Vec<(&'t str, &'t str)>,
    bytes: Vec<u8>,
}

fn blocks(text: &str) -> Vec<Block<'_>> {
    let mut blocks = Vec::new();
    for part in text.split("\n\n") {
        let mut block = Block { lines: Vec::new(), bytes: Vec::new() };
        for line in part.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "bytes" => block.bytes.extend(hex(rest)),
                _ => block.lines.push((word, rest.trim())),
            }
        }
        if !block.lines.is_empty() || !block.bytes.is_empty() {
            blocks.push(block);
        }
    }
    blocks
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<char> = text.chars().filter(|c| !c.is_whitespace()).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(&pair.iter().collect::<String>(), 16).unwrap()).collect()
}

fn numbers(text: &str) -> Vec<i64> {
    text.split_whitespace().map(|word| word.parse().unwrap()).collect()
}

fn value(text: &str) -> Option<(Kind, Value)> {
    let (kind, rest) = text.split_once(' ').unwrap_or((text, ""));
    Some(match kind {
        "null" => return None,
        "bool" => (Kind::Bool, Value::Bool(rest == "true")),
        "int" => (Kind::Int, Value::Int(rest.parse().unwrap())),
        "float" => (Kind::Float, Value::Float(rest.parse().unwrap())),
        "decimal" => (Kind::Decimal, Value::Decimal(rest.parse().unwrap())),
        "text" => (Kind::Text, Value::Text(rest.trim_matches('"').to_string())),
        "bytes" => (Kind::Bytes, Value::Bytes(hex(rest))),
        "uuid" => (Kind::Uuid, Value::Uuid(hex(rest).try_into().unwrap())),
        other => panic!("no such kind: {other}"),
    })
}

/// Any type of that kind.
fn type_of(kind: Kind) -> Type {
    match kind {
        Kind::Bool => Type::Boolean,
        Kind::Int => Type::BigInt,
        Kind::Float => Type::Double,
        Kind::Decimal => Type::Decimal { precision: 38, scale: 0 },
        Kind::Text => Type::Text,
        Kind::Bytes => Type::Bytea,
        Kind::Uuid => Type::Uuid,
    }
}

#[test]
fn images() {
    let blocks = blocks(include_str!("../../vectors/images.txt"));
    assert_eq!(blocks.len(), 5);
    for block in blocks {
        let row = block.lines[0].1;
        let values: Vec<_> = if row.is_empty() { Vec::new() } else { row.split(" | ").map(value).collect() };
        let mut builder = ImageBuilder::new(values.len() as u16);
        for (i, value) in values.iter().enumerate() {
            builder.set(i as u16, value.as_ref().map_or(&Value::Null, |(_, value)| value));
        }
        assert_eq!(builder.finish(), block.bytes, "row {row}");
        let (image, _, used) = ImageRef::parse(&block.bytes).unwrap();
        assert_eq!(used, block.bytes.len());
        for (i, value) in values.iter().enumerate() {
            match value {
                None => assert!(image.is_null(i as u16)),
                Some((kind, value)) => assert_eq!(&image.value(i as u16, type_of(*kind)).unwrap(), value),
            }
        }
    }
}

#[test]
fn messages() {
    for block in blocks(include_str!("../../vectors/messages.txt")) {
        let (name, fields) = block.lines[0];
        let f = numbers(fields);
        let descriptor = |f: &[i64]| Descriptor {
            present: f[0] as u32,
            slots: f[1] as u32,
            heap: f[2] as u32,
            columns: f[3] as u32,
        };
        let bytes = match name {
            "descriptor" => descriptor(&f).to_bytes().to_vec(),
            "configure" => {
                let [reads, reads_len, schema, schema_len] = [f[4], f[5], f[6], f[7]].map(|field| field as u32);
                Configure { params: descriptor(&f), reads, reads_len, schema, schema_len }.to_bytes().to_vec()
            }
            "read" => Read { column: f[0] as u16, kind: f[1] as u8, scale: f[2] as i8 }.to_bytes().to_vec(),
            "configured" => Configured { handle: f[0] as u32, schema: f[1] as u32 }.pack().to_le_bytes().to_vec(),
            "failed" => Configured::FAILED.to_le_bytes().to_vec(),
            "output" => (f[0] as u64 | (f[1] as u64) << 32).to_le_bytes().to_vec(),
            other => panic!("no such message: {other}"),
        };
        assert_eq!(bytes, block.bytes, "{name} {fields}");
    }
}

fn column(line: &str) -> ColumnDecl {
    let words: Vec<&str> = line.split_whitespace().collect();
    let ty = match words[2] {
        "Boolean" => Type::Boolean,
        "SmallInt" => Type::SmallInt,
        "Int" => Type::Int,
        "BigInt" => Type::BigInt,
        "Real" => Type::Real,
        "Double" => Type::Double,
        "Decimal" => Type::Decimal { precision: words[3].parse().unwrap(), scale: words[4].parse().unwrap() },
        "Text" => Type::Text,
        "Bytea" => Type::Bytea,
        "Date" => Type::Date,
        "Time" => Type::Time,
        "Timestamp" => Type::Timestamp,
        "Uuid" => Type::Uuid,
        "Json" => Type::Json,
        other => panic!("no such type: {other}"),
    };
    let flag = |name| words.last().is_some_and(|last| *last == name);
    ColumnDecl {
        id: words[0].parse().unwrap(),
        name: words[1].to_string(),
        ty,
        nullable: flag("nullable"),
        key: flag("key"),
    }
}

#[test]
fn schemas() {
    let blocks = blocks(include_str!("../../vectors/schemas.txt"));
    assert_eq!(blocks.len(), 4);
    for block in blocks {
        let schema = Schema { columns: block.lines.iter().map(|(_, line)| column(line)).collect() };
        assert_eq!(encode_schema(&schema).unwrap(), block.bytes, "{:?}", block.lines);
        assert_eq!(decode_schema(&block.bytes).unwrap(), schema);
    }
}

/// Plays the guest of the vector in the plainest way.
#[test]
fn batch() {
    let mut window = vec![0xaa; 1024];
    let (mut configure, mut batch, mut kept) = (0, Vec::new(), None);
    for block in blocks(include_str!("../../vectors/batch.txt")) {
        for (word, rest) in &block.lines {
            let f = numbers(rest);
            match *word {
                "at" => window[f[0] as usize..][..block.bytes.len()].copy_from_slice(&block.bytes),
                "configure" => configure = f[0] as usize,
                "filter" => batch = f,
                "kept" => kept = Some(f[0] as u64),
                other => panic!("no such line: {other}"),
            }
        }
    }
    let load = |at: usize| -> [u8; 8] { window[at..at + 8].try_into().unwrap() };
    let message = Configure::from_bytes(window[configure..][..CONFIGURE_BYTES].try_into().unwrap());
    let least = i64::from_le_bytes(load(message.params.slots as usize));
    let read = Read::from_bytes(window[message.reads as usize..][..4].try_into().unwrap());
    let schema = decode_schema(&window[message.schema as usize..][..message.schema_len as usize]).unwrap();
    assert_eq!((least, message.reads_len), (1000, 1));
    let distance = schema.column("distance").unwrap();
    assert_eq!((distance.id, distance.ty.kind() as u8), (read.column, read.kind));

    let mut answer = 0;
    for i in 0..batch[1] as usize {
        let at = batch[0] as usize + i * DESCRIPTOR_BYTES;
        let row = Descriptor::from_bytes(window[at..][..DESCRIPTOR_BYTES].try_into().unwrap());
        let column = u32::from(read.column);
        let present = column < row.columns && window[(row.present + column / 8) as usize] >> (column % 8) & 1 == 1;
        let far = present && i64::from_le_bytes(load((row.slots + column * 8) as usize)) >= least;
        answer |= u64::from(far) << i;
        // The descriptor says where the image just in front of it lies.
        let (image, place, _) = ImageRef::parse(&window[row.present as usize - 1..]).unwrap();
        assert_eq!(Descriptor::new(place, row.present - 1), row);
        assert_eq!(image.int(0), Some(i as i64 + 1));
    }
    assert_eq!(Some(answer), kept);
}

/// Plays the guest of the vector of changes, and reads what a change transform answers.
#[test]
fn changes() {
    let mut window = vec![0xaa; 1024];
    let (mut batch, mut kept, mut expanded) = (Vec::new(), None, None);
    for block in blocks(include_str!("../../vectors/changes.txt")) {
        for (word, rest) in &block.lines {
            match *word {
                "at" => window[numbers(rest)[0] as usize..][..block.bytes.len()].copy_from_slice(&block.bytes),
                "configure" | "row" => {}
                "filter" => batch = numbers(rest),
                "kept" => kept = Some(numbers(rest)[0] as u64),
                "output" => {
                    let rows = block.lines.iter().filter(|(word, _)| *word == "row").map(|(_, rest)| *rest);
                    expanded = Some((numbers(rest)[0] as usize, rows.collect::<Vec<_>>(), block.bytes.clone()));
                }
                other => panic!("no such line: {other}"),
            }
        }
    }
    let distance = |at: Descriptor| -> Option<i64> {
        let there = 3 < at.columns && window[at.present as usize] >> 3 & 1 == 1;
        there.then(|| i64::from_le_bytes(window[at.slots as usize + 24..][..8].try_into().unwrap()))
    };
    let (mut answer, mut ops) = (0, Vec::new());
    for i in 0..batch[1] as usize {
        let at = batch[0] as usize + i * CHANGE_DESCRIPTOR_BYTES;
        let bytes = window[at..][..CHANGE_DESCRIPTOR_BYTES].try_into().unwrap();
        let change = ChangeDescriptor::from_bytes(bytes);
        assert_eq!((change.to_bytes(), change.columns), (bytes, 4));
        for image in [change.old, change.new].into_iter().filter(|image| image.columns > 0) {
            let (_, place, _) = ImageRef::parse(&window[image.present as usize - 1..]).unwrap();
            assert_eq!(Descriptor::new(place, image.present - 1), image);
        }
        // The bitmap says what comparing the images says.
        let changed = window[change.changed as usize] >> 3 & 1 == 1;
        assert_eq!(changed, distance(change.old) != distance(change.new), "change {i}");
        answer |= u64::from(changed && distance(change.new).is_some_and(|miles| miles >= 1000)) << i;
        ops.push(change.op);
    }
    assert_eq!((Some(answer), ops), (kept, vec![1, 2, 2, 2, 3]));

    let (n, rows, bytes) = expanded.unwrap();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let counts: Vec<u32> = (0..n).map(|i| word(i * 4)).collect();
    assert_eq!(counts, [0, 2, 1]);
    for (i, row) in rows.into_iter().enumerate() {
        let at = n * 4 + i * DESCRIPTOR_BYTES;
        let descriptor = Descriptor::from_bytes(bytes[at..][..DESCRIPTOR_BYTES].try_into().unwrap());
        let (image, place, _) = ImageRef::parse(&bytes[descriptor.present as usize - 1..]).unwrap();
        assert_eq!(Descriptor::new(place, descriptor.present - 1), descriptor);
        for (column, text) in row.split(" | ").enumerate() {
            match value(text) {
                None => assert!(image.is_null(column as u16)),
                Some((kind, value)) => assert_eq!(image.value(column as u16, type_of(kind)), Ok(value)),
            }
        }
    }
}
