//! `#[filter]`, `#[transform]`, `#[derive(Params)]`, `#[derive(Row)]` and `#[derive(Output)]` of `guest-sdk`, where
//! they are documented. The code they write is thin: it implements the SDK's traits and leaves types to be checked
//! there, so that errors point at the user's own lines.
//!
//! - `plugin`: the attributes on functions.
//! - `derive`: the derives on structs.
//! - `text`: doc comments, names and defaults as manifest text.

mod derive;
mod plugin;
mod text;

use proc_macro::TokenStream;
use syn::parse_macro_input;

#[proc_macro_attribute]
pub fn filter(arguments: TokenStream, item: TokenStream) -> TokenStream {
    plugin::expand(plugin::Kind::Filter, arguments.into(), item.into())
        .unwrap_or_else(|e| e.into_compile_error())
        .into()
}

#[proc_macro_attribute]
pub fn transform(arguments: TokenStream, item: TokenStream) -> TokenStream {
    plugin::expand(plugin::Kind::Transform, arguments.into(), item.into())
        .unwrap_or_else(|e| e.into_compile_error())
        .into()
}

#[proc_macro_derive(Params, attributes(param))]
pub fn params(item: TokenStream) -> TokenStream {
    derive::params(parse_macro_input!(item)).unwrap_or_else(|e| e.into_compile_error()).into()
}

#[proc_macro_derive(Row, attributes(column))]
pub fn row(item: TokenStream) -> TokenStream {
    derive::row(parse_macro_input!(item)).unwrap_or_else(|e| e.into_compile_error()).into()
}

#[proc_macro_derive(Output, attributes(column))]
pub fn output(item: TokenStream) -> TokenStream {
    derive::output(parse_macro_input!(item)).unwrap_or_else(|e| e.into_compile_error()).into()
}
