//! DataFusion's errors as ours, in one place: what the caller did wrong, which limit was reached, what is our own bug.

use std::any::Any;

use datafusion::common::{DataFusionError, SchemaError};
use datafusion::sql::sqlparser::parser::ParserError;
use datafusion::sql::sqlparser::tokenizer::{Location, Span};

use super::SqlError;
use crate::store::StoreError;

impl SqlError {
    pub(crate) fn invalid(code: &'static str, message: impl Into<String>) -> SqlError {
        SqlError::Invalid { code, message: message.into(), position: None }
    }

    pub(crate) fn unsupported(what: impl Into<String>, hint: Option<&str>) -> SqlError {
        SqlError::Unsupported { what: what.into(), hint: hint.map(str::to_owned), position: None }
    }

    pub(crate) fn constraint(code: &'static str, message: impl Into<String>) -> SqlError {
        SqlError::Constraint { code, message: message.into() }
    }

    /// Says where, unless that is known already.
    pub(crate) fn at(mut self, offset: Option<usize>) -> SqlError {
        if let SqlError::Invalid { position, .. } | SqlError::Unsupported { position, .. } = &mut self {
            *position = position.or(offset);
        }
        self
    }

    pub(crate) fn at_span(self, text: &str, span: Span) -> SqlError {
        self.at(offset(text, span.start))
    }

    /// To travel through DataFusion and come out whole ([`from_datafusion`]).
    pub(crate) fn into_datafusion(self) -> DataFusionError {
        DataFusionError::External(Box::new(self))
    }
}

/// The byte offset of a tokenizer's location; `None` for the empty location (0, 0).
pub(crate) fn offset(text: &str, location: Location) -> Option<usize> {
    let line = usize::try_from(location.line).ok()?.checked_sub(1)?;
    let column = usize::try_from(location.column).ok()?.checked_sub(1)?;
    let start: usize = text.split_inclusive('\n').take(line).map(str::len).sum();
    let rest = text.get(start..)?;
    Some(start + rest.char_indices().nth(column).map_or(rest.len(), |(at, _)| at))
}

/// Where the parser stumbled: it says so only in its message.
fn parser_offset(text: &str, message: &str) -> Option<usize> {
    let (_, place) = message.rsplit_once("at Line: ")?;
    let (line, column) = place.split_once(", Column: ")?;
    let column: String = column.chars().take_while(char::is_ascii_digit).collect();
    offset(text, Location { line: line.parse().ok()?, column: column.parse().ok()? })
}

pub(crate) fn from_parser(error: ParserError, text: &str) -> SqlError {
    match error {
        ParserError::ParserError(message) | ParserError::TokenizerError(message) => {
            // At the end of the text it names no place.
            let end = message.contains("found: EOF").then_some(text.len());
            let position = parser_offset(text, &message).or(end);
            SqlError::Invalid { code: "syntax", message, position }
        }
        ParserError::RecursionLimitExceeded => SqlError::Limit("the statement is nested too deeply".to_owned()),
    }
}

/// A panic in one of DataFusion's parts, caught.
pub(crate) fn panicked(cause: Box<dyn Any + Send>) -> SqlError {
    let text = cause.downcast_ref::<&str>().copied().or_else(|| cause.downcast_ref::<String>().map(String::as_str));
    match text {
        // What a join without a key comes to when the memory pool is full: it runs one side again, which cannot.
        Some("partition not used yet") => SqlError::Limit(
            "the query needs more than sql.memory_bytes allows: narrow it, or raise the setting".to_owned(),
        ),
        text => SqlError::Internal(format!("the query panicked: {}", text.unwrap_or("without a word"))),
    }
}

/// Planning and execution errors; `text` is the SQL that positions refer to.
pub(crate) fn from_datafusion(error: DataFusionError, text: &str) -> SqlError {
    match error {
        DataFusionError::External(cause) => match cause.downcast::<SqlError>() {
            Ok(ours) => *ours,
            // A pattern that is none, or too large a one; of other functions it comes in other ways.
            Err(cause) if cause.to_string().starts_with("regex parse error") => {
                SqlError::invalid("evaluation", cause.to_string())
            }
            Err(cause) => SqlError::Internal(cause.to_string()),
        },
        DataFusionError::Diagnostic(diagnostic, cause) => {
            let position = diagnostic
                .span
                .and_then(|span| offset(text, Location { line: span.start.line, column: span.start.column }));
            from_datafusion(*cause, text).at(position)
        }
        DataFusionError::Context(_, cause) => from_datafusion(*cause, text),
        DataFusionError::Collection(mut causes) if !causes.is_empty() => from_datafusion(causes.swap_remove(0), text),
        DataFusionError::Shared(cause) => match std::sync::Arc::try_unwrap(cause) {
            Ok(cause) => from_datafusion(cause, text),
            Err(shared) => from_shared(&shared),
        },
        DataFusionError::SQL(cause, _) => from_parser(*cause, text),
        DataFusionError::ArrowError(cause, _) => from_arrow(*cause),
        DataFusionError::SchemaError(cause, _) => from_schema(*cause),
        DataFusionError::Plan(message) => from_plan(message),
        DataFusionError::NotImplemented(message) => SqlError::unsupported(subject(&message), None),
        DataFusionError::ResourcesExhausted(message) => SqlError::Limit(exhausted(&message)),
        DataFusionError::Execution(message) | DataFusionError::Configuration(message) => {
            from_words("evaluation", message)
        }
        DataFusionError::IoError(cause) if is_full("", &cause) => StoreError::DiskFull.into(),
        DataFusionError::Internal(message) if message.contains(BAD_PATTERN) => {
            let (_, reason) = message.split_once(BAD_PATTERN).unwrap_or_default();
            SqlError::invalid("evaluation", format!("{BAD_PATTERN}{reason}"))
        }
        DataFusionError::Internal(message) if message.contains("Cannot run range queries on datatype") => {
            SqlError::unsupported("RANGE with an offset over values of this type", Some("use ROWS"))
        }
        other => SqlError::Internal(other.to_string()),
    }
}

/// What a pattern does that is none, or too large a one: DataFusion takes it for a bug of its own when it comes up while
/// the query runs.
const BAD_PATTERN: &str = "Regular expression did not compile";

/// An error that several consumers of one plan hold at once (both sides of a join wait for the same scan).
fn from_shared(error: &DataFusionError) -> SqlError {
    match error.find_root() {
        DataFusionError::ResourcesExhausted(message) => SqlError::Limit(exhausted(message)),
        DataFusionError::Execution(message) | DataFusionError::Plan(message) => {
            from_words("evaluation", message.clone())
        }
        DataFusionError::ArrowError(cause, _) => from_shared_arrow(cause),
        DataFusionError::External(cause) => from_shared_ours(cause.as_ref()),
        DataFusionError::IoError(cause) if is_full("", cause) => StoreError::DiskFull.into(),
        other => SqlError::Internal(other.to_string()),
    }
}

/// What the caller can do something about, told to each who holds it.
fn from_shared_ours(cause: &(dyn std::error::Error + Send + Sync + 'static)) -> SqlError {
    match cause.downcast_ref::<SqlError>() {
        Some(SqlError::Limit(message)) => SqlError::Limit(message.clone()),
        Some(SqlError::Forbidden(refusal)) => SqlError::Forbidden(refusal.clone()),
        Some(SqlError::Constraint { code, message }) => SqlError::constraint(code, message.clone()),
        Some(SqlError::Invalid { code, message, position }) => {
            SqlError::Invalid { code, message: message.clone(), position: *position }
        }
        _ => SqlError::Internal(cause.to_string()),
    }
}

/// What a row does, whoever else is told of it; [`from_arrow`] for an error that is not ours to take apart.
fn from_shared_arrow(error: &::arrow::error::ArrowError) -> SqlError {
    use ::arrow::error::ArrowError;
    from_arrow(match error {
        ArrowError::DivideByZero => ArrowError::DivideByZero,
        ArrowError::ArithmeticOverflow(message) => ArrowError::ArithmeticOverflow(message.clone()),
        ArrowError::CastError(message) => ArrowError::CastError(message.clone()),
        ArrowError::ParseError(message) => ArrowError::ParseError(message.clone()),
        ArrowError::ComputeError(message) => ArrowError::ComputeError(message.clone()),
        ArrowError::InvalidArgumentError(message) => ArrowError::InvalidArgumentError(message.clone()),
        ArrowError::IoError(message, _) if is_spill_limit(message) => return SqlError::Limit(exhausted(message)),
        ArrowError::IoError(message, cause) if is_full(message, cause) => return StoreError::DiskFull.into(),
        other => return SqlError::Internal(other.to_string()),
    })
}

fn from_plan(message: String) -> SqlError {
    let code = if message.starts_with("Invalid function") {
        "unknown_function"
    } else if message.starts_with("Projections require unique") {
        "duplicate_column"
    } else if ["coerce", "type", "Type", "cast"].iter().any(|word| message.contains(word)) {
        "type_mismatch"
    } else {
        "invalid"
    };
    SqlError::invalid(code, message)
}

fn from_schema(error: SchemaError) -> SqlError {
    match error {
        SchemaError::FieldNotFound { field, valid_fields } => {
            let known: Vec<String> = valid_fields.iter().take(40).map(|column| column.flat_name()).collect();
            let known = if known.is_empty() { String::new() } else { format!("; there are: {}", known.join(", ")) };
            SqlError::invalid("unknown_column", format!("there is no column {:?} here{known}", field.flat_name()))
        }
        SchemaError::AmbiguousReference { field } => {
            let message = format!("column {:?} is ambiguous: say which table's it is", field.flat_name());
            SqlError::invalid("ambiguous_column", message)
        }
        other => SqlError::invalid("duplicate_column", other.to_string()),
    }
}

pub(crate) fn from_arrow(error: ::arrow::error::ArrowError) -> SqlError {
    use ::arrow::error::ArrowError;
    match error {
        ArrowError::DivideByZero => SqlError::invalid("division_by_zero", "division by zero"),
        ArrowError::ArithmeticOverflow(message) => SqlError::constraint("out_of_range", message),
        ArrowError::CastError(message) | ArrowError::ParseError(message) => from_words("type_mismatch", message),
        ArrowError::ComputeError(message) | ArrowError::InvalidArgumentError(message) => {
            from_words("evaluation", message)
        }
        ArrowError::IoError(message, _) if is_spill_limit(&message) => SqlError::Limit(exhausted(&message)),
        ArrowError::IoError(message, cause) if is_full(&message, &cause) => StoreError::DiskFull.into(),
        ArrowError::ExternalError(cause) => match cause.downcast::<DataFusionError>() {
            Ok(cause) => from_datafusion(*cause, ""),
            Err(cause) => SqlError::Internal(cause.to_string()),
        },
        other => SqlError::Internal(other.to_string()),
    }
}

/// What functions and casts say of a value. That a number is beyond its type they say only in words, each in its own.
fn from_words(code: &'static str, message: String) -> SqlError {
    // Behind a quote there may be a text of the user's, which says anything.
    let words = message.split('"').next().unwrap_or_default();
    let words = if words.starts_with("Cannot cast string") { "" } else { words };
    let beyond = ["verflow", "Can't cast value", "is out of range", "too large to store in", "too small to store in"];
    match beyond.iter().any(|beyond| words.contains(beyond)) {
        true => SqlError::constraint("out_of_range", message),
        false => SqlError::invalid(code, message),
    }
}

/// Whether a spill file found no room. The cause may be wrapped in another of its kind, which keeps only the text.
fn is_full(message: &str, cause: &std::io::Error) -> bool {
    const NO_SPACE: &str = "No space left on device";
    cause.kind() == std::io::ErrorKind::StorageFull
        || message.contains(NO_SPACE)
        || cause.to_string().contains(NO_SPACE)
}

/// What DataFusion says is missing, fit to stand before "is not supported".
fn subject(message: &str) -> String {
    // With the whole expression behind it, as a programmer sees it.
    if let Some(expression) = message.strip_prefix("Physical plan does not support logical expression ") {
        let kind = expression.split(|end: char| !end.is_alphanumeric()).next().unwrap_or_default();
        return match kind {
            "Exists" => "EXISTS in this place".to_owned(),
            "InSubquery" => "IN (sub-query) in this place".to_owned(),
            "SetComparison" => "ANY or ALL (sub-query) in this place".to_owned(),
            "ScalarSubquery" => "a sub-query that meets the outer query in this way".to_owned(),
            _ => "this expression in this place".to_owned(),
        };
    }
    let mut subject = message.trim().trim_end_matches('.');
    for tail in [" is not supported yet", " is not supported", " not supported", " not implemented", " is"] {
        subject = subject.strip_suffix(tail).unwrap_or(subject);
    }
    subject.strip_prefix("Unsupported ").unwrap_or(subject).to_owned()
}

/// The spill limit comes wrapped as an I/O error of the spill file's writer.
fn is_spill_limit(message: &str) -> bool {
    message.contains("allowable limit")
}

fn exhausted(message: &str) -> String {
    let setting = if message.contains("disk") { "sql.spill_bytes" } else { "sql.memory_bytes" };
    let first = message.lines().next().unwrap_or_default();
    format!("the query needs more than {setting} allows: narrow it, or raise the setting ({first})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_become_byte_offsets() {
        let text = "SELECT 'ü',\n  x FROM t";
        let at = |line, column| offset(text, Location { line, column });
        assert_eq!(at(1, 1), Some(0));
        assert_eq!(at(1, 11), Some(text.find(',').unwrap()));
        assert_eq!(at(2, 3), Some(text.find('x').unwrap()));
        assert_eq!(at(0, 0), None);
        let error = ParserError::ParserError("Expected: x, found: FROM at Line: 2, Column: 5".to_owned());
        let SqlError::Invalid { position, .. } = from_parser(error, text) else { panic!("not a syntax error") };
        assert_eq!(position, Some(text.find("FROM").unwrap()));
    }

    #[test]
    fn a_number_beyond_its_type_is_told_from_other_values() {
        let code = |message: &str| match from_words("evaluation", message.to_owned()) {
            SqlError::Constraint { code, .. } | SqlError::Invalid { code, .. } => code,
            other => panic!("{other}"),
        };
        assert_eq!(code("Int64Array overflow on abs(-9223372036854775808)"), "out_of_range");
        assert_eq!(code("Can't cast value 300000 to type Int16"), "out_of_range");
        assert_eq!(code("Cannot cast to Decimal128(10, 2). Overflowing on 999"), "out_of_range");
        assert_eq!(code("Cannot cast string 'overflow' to value of Int64 type"), "evaluation");
        assert_eq!(code("cannot parse \"overflow\""), "evaluation");
    }

    #[test]
    fn a_wrapped_error_comes_out_whole() {
        let inner = SqlError::constraint("not_null", "x");
        let wrapped = inner.into_datafusion().context("somewhere");
        assert!(matches!(from_datafusion(wrapped, ""), SqlError::Constraint { code: "not_null", .. }));
    }
}
