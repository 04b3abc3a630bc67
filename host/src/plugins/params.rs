//! What a plugin is configured with: parameters from JSON to an image, the manifest's columns resolved against an
//! input, and the schema an upload is tried with.

use serde_json::{Map, Value as Json};
use wire::abi::{ColumnType, ManifestLine, ParamType, Read};
use wire::image::ImageAt;
use wire::{ColumnDecl, ImageBuilder, ImageRef, Kind, Schema, Type};

use super::PluginError;

/// The parameters as the image that configure gets: column i is the i-th `param` line.
pub fn image(plugin: &str, manifest: &[ManifestLine], text: &str) -> Result<(Vec<u8>, ImageAt), PluginError> {
    let wrong = |message: String| PluginError::Params(format!("plugin {plugin}: {message}"));
    let given = object(text).map_err(wrong)?;
    let params: Vec<_> = params(manifest).collect();
    if let Some(unknown) = given.keys().find(|key| params.iter().all(|(name, ..)| name != key)) {
        return Err(wrong(format!("there is no parameter `{unknown}`; {}", known(&params))));
    }
    let mut builder = ImageBuilder::new(params.len() as u16);
    for (i, (name, ty, default)) in params.iter().enumerate() {
        let default = default.map(|text| parse_default(name, text)).transpose().map_err(wrong)?;
        let Some(value) = given.get(*name).or(default.as_ref()) else {
            return Err(wrong(format!("parameter `{name}` ({}) is required; {}", type_name(*ty), known(&params))));
        };
        // NULL is for optional parameters: those whose default it is.
        let nullable = default.as_ref().is_some_and(Json::is_null);
        set(&mut builder, i as u16, *ty, nullable, value).map_err(|found| {
            wrong(format!("parameter `{name}` has to be {}, not {found}; {}", type_name(*ty), known(&params)))
        })?;
    }
    let bytes = builder.finish();
    let (_, at, _) = ImageRef::parse(&bytes).map_err(|error| PluginError::Host(error.to_string()))?;
    Ok((bytes, at))
}

/// Whether every parameter has a default, so that the plugin can be tried without any.
pub fn all_have_defaults(manifest: &[ManifestLine]) -> bool {
    params(manifest).all(|(.., default)| default.is_some())
}

/// A default in a manifest: JSON text of the parameter's type, or null.
pub fn check_default(name: &str, ty: ParamType, text: &str) -> Result<(), String> {
    let value = parse_default(name, text)?;
    set(&mut ImageBuilder::new(1), 0, ty, true, &value)
        .map_err(|found| format!("the default of parameter `{name}` has to be {}, not {found}", type_name(ty)))
}

fn parse_default(name: &str, text: &str) -> Result<Json, String> {
    serde_json::from_str(text).map_err(|error| format!("the default of parameter `{name}` is not JSON: {error}"))
}

/// No text means no parameters.
fn object(text: &str) -> Result<Map<String, Json>, String> {
    if text.trim().is_empty() {
        return Ok(Map::new());
    }
    match serde_json::from_str(text) {
        Ok(Json::Object(object)) => Ok(object),
        Ok(other) => Err(format!("parameters are a JSON object like {{\"name\": value}}, not {other}")),
        Err(error) => Err(format!("the parameters are not JSON: {error}")),
    }
}

fn params(manifest: &[ManifestLine]) -> impl Iterator<Item = (&str, ParamType, Option<&str>)> {
    manifest.iter().filter_map(|line| match line {
        ManifestLine::Param { name, r#type, default, .. } => Some((name.as_str(), *r#type, default.as_deref())),
        _ => None,
    })
}

fn columns(manifest: &[ManifestLine]) -> impl Iterator<Item = (&str, ColumnType, bool)> {
    manifest.iter().filter_map(|line| match line {
        ManifestLine::Column { name, r#type, optional } => Some((name.as_str(), *r#type, *optional)),
        _ => None,
    })
}

fn known(params: &[(&str, ParamType, Option<&str>)]) -> String {
    if params.is_empty() {
        return "it takes no parameters".to_owned();
    }
    let describe = |(name, ty, default): &(&str, ParamType, Option<&str>)| match default {
        Some(default) => format!("{name} ({}, default {default})", type_name(*ty)),
        None => format!("{name} ({}, required)", type_name(*ty)),
    };
    format!("it takes {}", params.iter().map(describe).collect::<Vec<_>>().join(", "))
}

fn type_name(ty: ParamType) -> &'static str {
    match ty {
        ParamType::Bool => "a bool",
        ParamType::Int => "an int",
        ParamType::Float => "a float",
        ParamType::Text => "a text",
    }
}

/// On a wrong type: what was found.
fn set(builder: &mut ImageBuilder, column: u16, ty: ParamType, nullable: bool, value: &Json) -> Result<(), String> {
    match (ty, value) {
        (_, Json::Null) if nullable => return Ok(()),
        (ParamType::Bool, Json::Bool(value)) => builder.set_bool(column, *value),
        (ParamType::Text, Json::String(value)) => builder.set_bytes(column, value.as_bytes()),
        (ParamType::Int, Json::Number(number)) => {
            let value = number.as_i64().ok_or_else(|| format!("{number} (no 64-bit integer)"))?;
            builder.set_int(column, value);
        }
        (ParamType::Float, Json::Number(number)) => {
            let value = number.as_f64().ok_or_else(|| format!("{number}"))?;
            builder.set_float(column, value);
        }
        (_, other) => return Err(other.to_string()),
    }
    Ok(())
}

/// The manifest's columns as they lie in the input: what configure gets as `reads`.
pub fn reads(plugin: &str, manifest: &[ManifestLine], input: &Schema) -> Result<Vec<u8>, PluginError> {
    let mut out = Vec::new();
    for (name, expected, optional) in columns(manifest) {
        let read = match input.column(name) {
            Some(column) if fits(expected, column.ty) => Read::new(column.id, column.ty.kind(), scale(column.ty)),
            Some(column) => {
                return Err(PluginError::Params(format!(
                    "plugin {plugin} reads column `{name}` as {}, but it is {}",
                    column_type_name(expected),
                    sql_name(column.ty)
                )));
            }
            None if optional => Read::new(Read::MISSING, Kind::Int, 0),
            None => {
                let names: Vec<_> = input.columns.iter().map(|column| column.name.as_str()).collect();
                return Err(PluginError::Params(format!(
                    "plugin {plugin} reads column `{name}` ({}), which its input does not have; there are {} (a plugin \
                     sees the table's columns, whatever the SELECT list; behind a transform, what that makes; of a query \
                     that is run again as a whole, the result's)",
                    column_type_name(expected),
                    names.join(", ")
                )));
            }
        };
        out.extend_from_slice(&read.to_bytes());
    }
    Ok(out)
}

fn scale(ty: Type) -> i8 {
    match ty {
        Type::Decimal { scale, .. } => scale,
        _ => 0,
    }
}

fn fits(expected: ColumnType, ty: Type) -> bool {
    match expected {
        ColumnType::Any => true,
        ColumnType::Bool => ty.kind() == Kind::Bool,
        ColumnType::Int => ty.kind() == Kind::Int,
        ColumnType::Float => ty.kind() == Kind::Float,
        ColumnType::Number => matches!(ty.kind(), Kind::Int | Kind::Float | Kind::Decimal),
        ColumnType::Decimal => ty.kind() == Kind::Decimal,
        ColumnType::Text => ty.kind() == Kind::Text,
        ColumnType::Bytes => ty.kind() == Kind::Bytes,
        ColumnType::Uuid => ty.kind() == Kind::Uuid,
    }
}

fn column_type_name(ty: ColumnType) -> &'static str {
    match ty {
        ColumnType::Bool => "BOOLEAN",
        ColumnType::Int => "an integer, DATE, TIME or TIMESTAMP",
        ColumnType::Float => "REAL or DOUBLE",
        ColumnType::Number => "a number",
        ColumnType::Decimal => "DECIMAL",
        ColumnType::Text => "TEXT or JSON",
        ColumnType::Bytes => "BYTEA",
        ColumnType::Uuid => "UUID",
        ColumnType::Any => "any type",
    }
}

fn sql_name(ty: Type) -> String {
    match ty {
        Type::Decimal { precision, scale } => format!("DECIMAL({precision}, {scale})"),
        other => format!("{other:?}").to_uppercase(),
    }
}

/// A table that has just the columns a manifest declares: what an upload is tried with.
pub fn declared_schema(manifest: &[ManifestLine]) -> Schema {
    let declare = |(id, (name, ty, _)): (usize, (&str, ColumnType, bool))| ColumnDecl {
        id: id as u16,
        name: name.to_owned(),
        ty: example(ty),
        nullable: true,
        key: false,
    };
    Schema { columns: columns(manifest).enumerate().map(declare).collect() }
}

fn example(ty: ColumnType) -> Type {
    match ty {
        ColumnType::Bool => Type::Boolean,
        ColumnType::Int => Type::BigInt,
        ColumnType::Float | ColumnType::Number => Type::Double,
        ColumnType::Decimal => Type::Decimal { precision: 18, scale: 2 },
        ColumnType::Text | ColumnType::Any => Type::Text,
        ColumnType::Bytes => Type::Bytea,
        ColumnType::Uuid => Type::Uuid,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::Value;

    fn manifest(lines: &[&str]) -> Vec<ManifestLine> {
        lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn parameters_become_an_image_or_say_what_is_known() {
        let manifest = manifest(&[
            r#"{"param":{"name":"minutes","type":"int","default":"15"}}"#,
            r#"{"param":{"name":"carrier","type":"text","default":"null"}}"#,
            r#"{"param":{"name":"factor","type":"float"}}"#,
        ]);
        let (bytes, _) = image("late", &manifest, r#"{"factor": 2, "minutes": -3}"#).unwrap();
        let (image_ref, ..) = ImageRef::parse(&bytes).unwrap();
        assert_eq!(image_ref.value(0, Type::BigInt), Ok(Value::Int(-3)));
        assert_eq!(image_ref.value(1, Type::Text), Ok(Value::Null));
        assert_eq!(image_ref.value(2, Type::Double), Ok(Value::Float(2.0)));

        for (text, expected) in [
            (
                "",
                "parameter `factor` (a float) is required; it takes minutes (an int, default 15), carrier (a text, default null), factor (a float, required)",
            ),
            (r#"{"factor":1,"minute":3}"#, "there is no parameter `minute`; it takes minutes"),
            (r#"{"factor":1,"minutes":"3"}"#, "parameter `minutes` has to be an int, not \"3\""),
            (r#"{"factor":1,"minutes":1.5}"#, "parameter `minutes` has to be an int, not 1.5"),
            (r#"{"factor":1,"minutes":null}"#, "parameter `minutes` has to be an int, not null"),
            ("[1]", "parameters are a JSON object"),
            ("{", "the parameters are not JSON"),
        ] {
            let error = image("late", &manifest, text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn columns_are_resolved_by_name_and_type() {
        let manifest = manifest(&[
            r#"{"column":{"name":"delay","type":"number"}}"#,
            r#"{"column":{"name":"gone","type":"text","optional":true}}"#,
        ]);
        let column = |id, ty| ColumnDecl { id, name: "delay".to_owned(), ty, nullable: true, key: false };
        let input = Schema { columns: vec![column(5, Type::Decimal { precision: 9, scale: 2 })] };
        let expected = [Read::new(5, Kind::Decimal, 2), Read::new(Read::MISSING, Kind::Int, 0)];
        assert_eq!(reads("late", &manifest, &input).unwrap(), expected.map(Read::to_bytes).concat());

        let input = Schema { columns: vec![column(0, Type::Text)] };
        let error = reads("late", &manifest, &input).unwrap_err().to_string();
        assert_eq!(error, "plugin late reads column `delay` as a number, but it is TEXT");
        let error = reads("late", &manifest, &Schema::default()).unwrap_err().to_string();
        assert!(error.contains("`delay` (a number), which its input does not have"), "{error}");
    }
}
