//! `#[filter]` and `#[transform]`: the function stays as it is; beside it stand an implementation of the SDK's traits
//! and, in wasm, the exports.

use proc_macro2::{Group, Ident, Span, TokenStream, TokenTree};
use quote::{ToTokens, quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{Error, FnArg, GenericParam, ItemFn, Result, ReturnType, Type};

use crate::text;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Filter,
    Transform,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Filter => "filter",
            Kind::Transform => "transform",
        }
    }
}

pub fn expand(kind: Kind, arguments: TokenStream, item: TokenStream) -> Result<TokenStream> {
    if !arguments.is_empty() {
        return Err(Error::new_spanned(arguments, format!("#[{}] takes no arguments", kind.name())));
    }
    let function: ItemFn = syn::parse2(item)
        .map_err(|error| Error::new(error.span(), format!("#[{}] goes on a function: {error}", kind.name())))?;
    let signature = Signature::of(kind, &function)?;
    let describe = describe(&signature);
    let call = match kind {
        Kind::Filter => filter(&function, &signature),
        Kind::Transform => transform(&function, &signature),
    };
    let export = export(kind, &function, &signature);
    Ok(quote! {
        #function

        // One crate is one plugin: a second one meets this name.
        #[doc(hidden)]
        #[allow(dead_code)]
        enum __TidegatePlugin {}

        const _: () = {
            #describe
            #call
            #export
        };
    })
}

/// What a plugin's function takes and gives, lifetimes left to inference.
struct Signature {
    params: Option<Type>,
    row: Type,
    output: Type,
}

impl Signature {
    fn of(kind: Kind, function: &ItemFn) -> Result<Self> {
        let signature = &function.sig;
        let refuse = |at: &dyn ToTokens, why: &str| Err(Error::new_spanned(at.to_token_stream(), why));
        if let Some(token) = &signature.asyncness {
            return refuse(token, "a plugin's function is called and answers: it cannot be async");
        }
        if let Some(generic) = signature.generics.params.iter().find(|g| !matches!(g, GenericParam::Lifetime(_))) {
            return refuse(generic, "a plugin's function has no generics but lifetimes");
        }
        let output = match &signature.output {
            ReturnType::Type(_, ty) => infer_lifetimes(ty)?,
            ReturnType::Default if kind == Kind::Filter => return refuse(&signature.ident, "a filter answers `bool`"),
            ReturnType::Default => return refuse(&signature.ident, "a transform answers its output row"),
        };
        let arguments: Vec<&FnArg> = signature.inputs.iter().collect();
        match arguments[..] {
            [row] => Ok(Signature { params: None, row: referenced(row)?, output }),
            [params, row] => Ok(Signature { params: Some(referenced(params)?), row: referenced(row)?, output }),
            _ => refuse(&signature.ident, "a plugin's function takes `(&Params, &Row)`, or `(&Row)` alone"),
        }
    }

    fn params(&self) -> TokenStream {
        self.params.as_ref().map_or_else(|| quote!(()), ToTokens::to_token_stream)
    }
}

/// The `T` of an argument `&T`.
fn referenced(argument: &FnArg) -> Result<Type> {
    if let FnArg::Typed(argument) = argument
        && let Type::Reference(reference) = &*argument.ty
        && reference.mutability.is_none()
    {
        return infer_lifetimes(&reference.elem);
    }
    Err(Error::new_spanned(argument, "a plugin borrows its arguments: take `&Params` and `&Row`"))
}

/// The type with its named lifetimes as `'_`: the code beside the function cannot name them.
fn infer_lifetimes(ty: &Type) -> Result<Type> {
    fn walk(tokens: TokenStream) -> TokenStream {
        let mut after_quote = false;
        tokens
            .into_iter()
            .map(|token| {
                let lifetime = core::mem::replace(&mut after_quote, false);
                match token {
                    TokenTree::Ident(ident) if lifetime && ident != "static" => Ident::new("_", ident.span()).into(),
                    TokenTree::Group(group) => {
                        let mut inner = Group::new(group.delimiter(), walk(group.stream()));
                        inner.set_span(group.span());
                        inner.into()
                    }
                    TokenTree::Punct(punct) => {
                        after_quote = punct.as_char() == '\'';
                        punct.into()
                    }
                    token => token,
                }
            })
            .collect()
    }
    syn::parse2(walk(ty.to_token_stream()))
}

fn describe(signature: &Signature) -> TokenStream {
    let (params, row) = (signature.params(), &signature.row);
    let row_columns = quote_spanned!(row.span()=> <#row as ::guest_sdk::row::FromRow<'_>>::COLUMNS);
    quote! {
        type Parameters = #params;
        struct Plugin;
        const READS: &[::guest_sdk::row::ColumnSpec] = #row_columns;
    }
}

fn filter(function: &ItemFn, signature: &Signature) -> TokenStream {
    let call = call(function, signature);
    let (params, output) = (signature.params(), &signature.output);
    let verdict = quote_spanned!(output.span()=> <#output as ::guest_sdk::output::Verdict>::verdict(answer));
    quote! {
        impl ::guest_sdk::plugin::Describe for Plugin {
            type Params = #params;
            const READS: &'static [::guest_sdk::row::ColumnSpec] = READS;
        }
        impl ::guest_sdk::plugin::Filter for Plugin {
            #[inline]
            fn keep(
                params: &Parameters,
                row: &::guest_sdk::row::Row<'_>,
            ) -> ::guest_sdk::__private::Result<bool, ::guest_sdk::__private::String> {
                #call
                #verdict
            }
        }
    }
}

fn transform(function: &ItemFn, signature: &Signature) -> TokenStream {
    let call = call(function, signature);
    let (params, output) = (signature.params(), &signature.output);
    let columns = quote_spanned!(output.span()=> <#output as ::guest_sdk::output::Transformed>::COLUMNS);
    let write = quote_spanned!(output.span()=> <#output as ::guest_sdk::output::Transformed>::write(answer, image));
    quote! {
        impl ::guest_sdk::plugin::Describe for Plugin {
            type Params = #params;
            const READS: &'static [::guest_sdk::row::ColumnSpec] = READS;
            const OUTPUT: &'static [(&'static str, ::guest_sdk::__private::Type, bool)] = #columns;
        }
        impl ::guest_sdk::plugin::Transform for Plugin {
            #[inline]
            fn apply(
                params: &Parameters,
                row: &::guest_sdk::row::Row<'_>,
                image: &mut ::guest_sdk::__private::ImageBuilder,
            ) -> ::guest_sdk::__private::Result<(), ::guest_sdk::__private::String> {
                #call
                #write
            }
        }
    }
}

/// Makes the row struct and calls the user's function; types are inferred from its signature.
fn call(function: &ItemFn, signature: &Signature) -> TokenStream {
    let (name, row) = (&function.sig.ident, &signature.row);
    let params = signature.params.as_ref().map(|_| quote!(params,));
    let read = quote_spanned!(row.span()=> <#row as ::guest_sdk::row::FromRow<'_>>::from_row(row));
    quote! {
        let _ = params;
        let row = #read;
        let answer = #name(#params &row);
    }
}

fn export(kind: Kind, function: &ItemFn, signature: &Signature) -> TokenStream {
    let kind = Ident::new(kind.name(), Span::call_site());
    let row = &signature.row;
    let name = text::json_string(&text::name(&function.sig.ident));
    let doc = text::doc(&function.attrs).map(|doc| format!(",\"doc\":{}", text::json_string(&doc))).unwrap_or_default();
    // The version here is the SDK's own, compared with the host's before anything runs.
    let line = format!("{{\"plugin\":{{\"abi\":1,\"name\":{name}{doc}}}}}\n");
    quote! {
        #[cfg(target_arch = "wasm32")]
        ::guest_sdk::__export!(#kind, Plugin, &[
            &[#line],
            <Parameters as ::guest_sdk::params::Params>::MANIFEST,
            <#row as ::guest_sdk::row::FromRow<'_>>::MANIFEST,
        ]);
    }
}
