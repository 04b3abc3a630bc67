//! JSON in SQL: the functions and operators of `datafusion-functions-json`, and what they find as a JSON column.
//!
//! None of them makes a value larger than the text it is found in, so they need no cap. Their own type, a union of what
//! a JSON value can be, is not one of ours: in results it is JSON text again.

use std::sync::Arc;

use ::arrow::array::{Array, ArrayRef, StringBuilder, UnionArray};
use datafusion::common::Result;
use datafusion::execution::SessionState;
use datafusion_functions_json::{JsonUnionEncoder, JsonUnionValue};

/// Adds the functions, `->`, `->>`, `#>` and `#>>`.
pub(crate) fn install(state: &mut SessionState) -> Result<()> {
    datafusion_functions_json::register_all(state)
}

/// Found values as JSON text; nothing found, and a JSON null, are NULL.
pub(crate) fn union_to_text(array: &ArrayRef) -> Option<ArrayRef> {
    let union = array.as_any().downcast_ref::<UnionArray>()?;
    let values = JsonUnionEncoder::from_union(union.clone())?;
    let mut texts = StringBuilder::with_capacity(array.len(), array.len() * 16);
    for row in 0..array.len() {
        match values.get_value(row) {
            JsonUnionValue::JsonNull => texts.append_null(),
            JsonUnionValue::Bool(value) => texts.append_value(if value { "true" } else { "false" }),
            JsonUnionValue::Int(value) => texts.append_value(value.to_string()),
            JsonUnionValue::Float(value) => texts.append_value(serde_json::Value::from(value).to_string()),
            JsonUnionValue::Str(value) => texts.append_value(serde_json::Value::from(value).to_string()),
            JsonUnionValue::Array(text) | JsonUnionValue::Object(text) => texts.append_value(text),
        }
    }
    Some(Arc::new(texts.finish()))
}
