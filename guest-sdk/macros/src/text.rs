//! Doc comments, names and defaults as manifest text.

use syn::{Attribute, Error, Expr, ExprLit, ExprUnary, Ident, Lit, Meta, Result, UnOp, ext::IdentExt};

/// The doc comment, its lines joined by spaces.
pub fn doc(attributes: &[Attribute]) -> Option<String> {
    let lines: Vec<String> = attributes.iter().filter_map(doc_line).collect();
    let doc = lines.join(" ").trim().to_string();
    (!doc.is_empty()).then_some(doc)
}

fn doc_line(attribute: &Attribute) -> Option<String> {
    let Meta::NameValue(meta) = &attribute.meta else { return None };
    if !meta.path.is_ident("doc") {
        return None;
    }
    match &meta.value {
        Expr::Lit(ExprLit { lit: Lit::Str(line), .. }) => Some(line.value().trim().to_string()),
        _ => None,
    }
}

/// A field's name as SQL knows it: `r#type` is `type`.
pub fn name(ident: &Ident) -> String {
    ident.unraw().to_string()
}

/// A JSON string, quotes included.
pub fn json_string(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c if u32::from(c) < 0x20 => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// The JSON text of a default: a literal, or a minus sign and a number.
pub fn json_literal(default: &Expr) -> Result<String> {
    match default {
        Expr::Lit(ExprLit { lit, .. }) => match lit {
            Lit::Bool(value) => Ok(value.value.to_string()),
            Lit::Int(value) => Ok(value.base10_digits().to_string()),
            Lit::Float(value) => Ok(json_float(value.base10_digits())),
            Lit::Str(value) => Ok(json_string(&value.value())),
            _ => Err(not_a_default(default)),
        },
        Expr::Unary(ExprUnary { op: UnOp::Neg(_), expr, .. })
            if matches!(**expr, Expr::Lit(ExprLit { lit: Lit::Int(_) | Lit::Float(_), .. })) =>
        {
            Ok(format!("-{}", json_literal(expr)?))
        }
        _ => Err(not_a_default(default)),
    }
}

/// Rust writes `1.`, JSON does not.
fn json_float(digits: &str) -> String {
    if digits.ends_with('.') { format!("{digits}0") } else { digits.to_string() }
}

fn not_a_default(default: &Expr) -> Error {
    Error::new_spanned(
        default,
        "a default is a literal: true, 15, -1.5 or \"text\"; the manifest is read without running code",
    )
}
