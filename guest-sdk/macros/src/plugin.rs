//! `#[filter]` and `#[transform]`: the function stays as it is; beside it stand an implementation of the SDK's traits
//! and, in wasm, the exports.

use proc_macro2::{Group, Ident, Span, TokenStream, TokenTree};
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{
    Error, Expr, ExprLit, FnArg, GenericArgument, GenericParam, ItemFn, Lit, MetaNameValue, PathArguments, Result,
    ReturnType, Type,
};

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
    let pass = Pass::parse(kind, arguments)?;
    let function: ItemFn = syn::parse2(item)
        .map_err(|error| Error::new(error.span(), format!("#[{}] goes on a function: {error}", kind.name())))?;
    let signature = Signature::of(kind, &function)?;
    let describe = describe(&signature);
    let call = match kind {
        Kind::Filter => filter(&function, &signature),
        Kind::Transform => transform(&function, &signature),
    };
    let export = export(kind, pass, &function, &signature);
    // Left to itself the compiler calls it, and everything that a batch's rows share is loaded again for each.
    let inlined = !function.attrs.iter().any(|attribute| attribute.path().is_ident("inline"));
    let inline = inlined.then(|| quote!(#[inline(always)]));
    Ok(quote! {
        #inline
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

/// Whether a live query may ask for rows to be let through that the filter fails on.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Pass(bool);

impl Pass {
    fn parse(kind: Kind, arguments: TokenStream) -> Result<Self> {
        if arguments.is_empty() {
            return Ok(Pass(true));
        }
        let known = if kind == Kind::Filter { "only `pass = false`" } else { "no arguments" };
        let refused = Error::new_spanned(&arguments, format!("#[{}] takes {known}", kind.name()));
        match syn::parse2::<MetaNameValue>(arguments) {
            Ok(MetaNameValue { path, value: Expr::Lit(ExprLit { lit: Lit::Bool(value), .. }), .. })
                if kind == Kind::Filter && path.is_ident("pass") =>
            {
                Ok(Pass(value.value))
            }
            _ => Err(refused),
        }
    }
}

/// What a plugin's function takes and gives, lifetimes left to inference.
struct Signature {
    params: Option<Type>,
    /// Of a change: the type of its rows.
    row: Type,
    change: bool,
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
            [row] => Ok(Signature::new(None, referenced(row)?, output)),
            [params, row] => Ok(Signature::new(Some(referenced(params)?), referenced(row)?, output)),
            _ => {
                let takes =
                    "a plugin's function takes `(&Params, &Row)` or `(&Params, &Change<Row>)`, or the second alone";
                refuse(&signature.ident, takes)
            }
        }
    }

    fn new(params: Option<Type>, row: Type, output: Type) -> Self {
        match change_of(&row) {
            Some(row) => Signature { params, row, change: true, output },
            None => Signature { params, row, change: false, output },
        }
    }

    /// The trait of a filter or transform, and what it is given.
    fn input(&self, name: &str) -> (Ident, TokenStream) {
        if self.change {
            (format_ident!("Change{name}"), quote!(::guest_sdk::change::RawChange<'_>))
        } else {
            (format_ident!("{name}"), quote!(::guest_sdk::row::Row<'_>))
        }
    }

    fn params(&self) -> TokenStream {
        self.params.as_ref().map_or_else(|| quote!(()), ToTokens::to_token_stream)
    }
}

/// The `R` of a `Change<R>`, which is told by its name; `Row` where it names none.
fn change_of(ty: &Type) -> Option<Type> {
    let Type::Path(path) = ty else { return None };
    let last = path.path.segments.last().filter(|last| last.ident == "Change")?;
    let named = match &last.arguments {
        PathArguments::AngleBracketed(arguments) => arguments.args.iter().find_map(|argument| match argument {
            GenericArgument::Type(ty) => Some(ty.clone()),
            _ => None,
        }),
        _ => None,
    };
    named.or_else(|| syn::parse2(quote_spanned!(last.span()=> ::guest_sdk::row::Row<'_>)).ok())
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

/// Names in the code beside the user's function begin with `__`: that code sees the user's names, and a struct called
/// `Parameters` or a function called `input` would otherwise be taken for what is written here.
fn describe(signature: &Signature) -> TokenStream {
    let (params, row) = (signature.params(), &signature.row);
    let row_columns = quote_spanned!(row.span()=> <#row as ::guest_sdk::row::FromRow<'_>>::COLUMNS);
    quote! {
        type __Params = #params;
        struct __Plugin;
        const __READS: &[::guest_sdk::row::ColumnSpec] = #row_columns;
    }
}

fn filter(function: &ItemFn, signature: &Signature) -> TokenStream {
    let call = call(function, signature);
    let (params, output) = (signature.params(), &signature.output);
    let verdict = quote_spanned!(output.span()=> <#output as ::guest_sdk::output::Verdict>::verdict(__answer));
    let (kind, input) = signature.input("Filter");
    let answer = quote! {
        impl ::guest_sdk::plugin::#kind for __Plugin {
            #[inline]
            fn keep(
                __params: &__Params,
                __input: &#input,
            ) -> ::guest_sdk::__private::Result<bool, ::guest_sdk::__private::String> {
                #call
                #verdict
            }
        }
    };
    quote! {
        impl ::guest_sdk::plugin::Describe for __Plugin {
            type Params = #params;
            const READS: &'static [::guest_sdk::row::ColumnSpec] = __READS;
        }
        #answer
    }
}

fn transform(function: &ItemFn, signature: &Signature) -> TokenStream {
    let call = call(function, signature);
    let (params, output) = (signature.params(), &signature.output);
    let answers = if signature.change { quote!(Expanded) } else { quote!(Transformed) };
    let columns = quote_spanned!(output.span()=> <#output as ::guest_sdk::output::#answers>::COLUMNS);
    let answer = if signature.change {
        let each = quote_spanned!(output.span()=> <#output as ::guest_sdk::output::Expanded>::each(__answer, __row));
        quote! {
            impl ::guest_sdk::plugin::ChangeTransform for __Plugin {
                #[inline]
                fn expand(
                    __params: &__Params,
                    __input: &::guest_sdk::change::RawChange<'_>,
                    __row: &mut dyn FnMut(&dyn Fn(&mut ::guest_sdk::__private::ImageBuilder)),
                ) -> ::guest_sdk::__private::Result<(), ::guest_sdk::__private::String> {
                    #call
                    #each
                }
            }
        }
    } else {
        let write = quote_spanned! {output.span()=>
            <#output as ::guest_sdk::output::Transformed>::write(__answer, __image)
        };
        quote! {
            impl ::guest_sdk::plugin::Transform for __Plugin {
                #[inline]
                fn apply(
                    __params: &__Params,
                    __input: &::guest_sdk::row::Row<'_>,
                    __image: &mut ::guest_sdk::__private::ImageBuilder,
                ) -> ::guest_sdk::__private::Result<(), ::guest_sdk::__private::String> {
                    #call
                    #write
                }
            }
        }
    };
    quote! {
        impl ::guest_sdk::plugin::Describe for __Plugin {
            type Params = #params;
            const READS: &'static [::guest_sdk::row::ColumnSpec] = __READS;
            const OUTPUT: &'static [(&'static str, ::guest_sdk::__private::Type, bool)] = #columns;
        }
        #answer
    }
}

/// Makes the row struct and calls the user's function; types are inferred from its signature.
fn call(function: &ItemFn, signature: &Signature) -> TokenStream {
    let (name, row) = (&function.sig.ident, &signature.row);
    let params = signature.params.as_ref().map(|_| quote!(__params,));
    let read = if signature.change {
        quote_spanned!(row.span()=> __input.read::<#row>())
    } else {
        quote_spanned!(row.span()=> <#row as ::guest_sdk::row::FromRow<'_>>::from_row(__input))
    };
    quote! {
        let _ = __params;
        let __input = #read;
        let __answer = #name(#params &__input);
    }
}

fn export(kind: Kind, Pass(pass): Pass, function: &ItemFn, signature: &Signature) -> TokenStream {
    let told = format!("{}_{}", if signature.change { "change" } else { "row" }, kind.name());
    let kind = Ident::new(if signature.change { &told } else { kind.name() }, Span::call_site());
    let row = &signature.row;
    let name = text::json_string(&text::name(&function.sig.ident));
    let doc = text::doc(&function.attrs).map(|doc| format!(",\"doc\":{}", text::json_string(&doc))).unwrap_or_default();
    // The version here is the SDK's own, compared with the host's before anything runs.
    let pass = if pass { "" } else { ",\"pass\":false" };
    let line = format!("{{\"plugin\":{{\"abi\":1,\"kind\":\"{told}\"{pass},\"name\":{name}{doc}}}}}\n");
    quote! {
        #[cfg(target_arch = "wasm32")]
        ::guest_sdk::__export!(#kind, __Plugin, &[
            &[#line],
            <__Params as ::guest_sdk::params::Params>::MANIFEST,
            <#row as ::guest_sdk::row::FromRow<'_>>::MANIFEST,
        ]);
    }
}
