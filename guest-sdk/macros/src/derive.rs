//! `#[derive(Params)]`, `#[derive(Row)]` and `#[derive(Output)]`.

use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{Data, DeriveInput, Error, Expr, Field, Fields, GenericParam, Ident, Lifetime, LitStr, Result};

use crate::text;

/// The most columns that an image can have.
const MAX_COLUMNS: usize = 1024;

pub fn params(input: DeriveInput) -> Result<TokenStream> {
    if !input.generics.params.is_empty() {
        return Err(Error::new_spanned(
            &input.generics,
            "parameters own their values: the struct can have no generics",
        ));
    }
    let ident = &input.ident;
    let (mut manifest, mut reads, mut checks) = (Vec::new(), Vec::new(), Vec::new());
    for (i, (field, field_ident)) in (0u16..).zip(fields(&input, "parameters")?) {
        let (ty, name, span) = (&field.ty, text::name(field_ident), field.ty.span());
        let ParamOptions { default } = ParamOptions::of(field)?;
        let head = format!("{{\"param\":{{\"name\":{},\"type\":\"", text::json_string(&name));
        let default_part = match &default {
            Some(default) => {
                let json = format!(",\"default\":{}", text::json_string(&text::json_literal(default)?));
                // Spanned on the default, so that one of the wrong type is marked itself.
                checks.push(quote_spanned! {default.span()=>
                    const _: <#ty as ::guest_sdk::params::ParamValue>::Literal = #default;
                });
                quote!(#json)
            }
            None => quote!(<#ty as ::guest_sdk::params::ParamValue>::NO_DEFAULT),
        };
        let doc =
            text::doc(&field.attrs).map(|doc| format!(",\"doc\":{}", text::json_string(&doc))).unwrap_or_default();
        let tail = format!("{doc}}}}}\n");
        manifest.push(quote_spanned! {span=>
            #head, <#ty as ::guest_sdk::params::ParamValue>::TYPE, "\"", #default_part, #tail
        });
        reads.push(quote_spanned!(span=> #field_ident: values.get(#i, #name)?));
    }
    Ok(quote! {
        const _: () = {
            #(#checks)*
            impl ::guest_sdk::params::Params for #ident {
                const MANIFEST: &'static [&'static str] = &[#(#manifest),*];
                fn from_values(
                    values: &::guest_sdk::params::ParamValues<'_>,
                ) -> ::guest_sdk::__private::Result<Self, ::guest_sdk::__private::String> {
                    let _ = values;
                    ::guest_sdk::__private::Result::Ok(#ident { #(#reads),* })
                }
            }
        };
    })
}

pub fn row(input: DeriveInput) -> Result<TokenStream> {
    let Some(lifetime) = lifetime(&input)? else {
        let hint = format!("a row borrows its columns: write `struct {}<'a>` with fields `Column<'a, …>`", input.ident);
        return Err(Error::new_spanned(&input.ident, hint));
    };
    let ident = &input.ident;
    let (mut manifest, mut specs, mut reads, mut names) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (i, (field, field_ident)) in fields(&input, "rows")?.into_iter().enumerate() {
        let (ty, span) = (&field.ty, field.ty.span());
        let ColumnOptions { name, optional } = ColumnOptions::of(field, field_ident, true)?;
        if names.contains(&name) {
            return Err(Error::new_spanned(field_ident, format!("another field reads column `{name}` already")));
        }
        let head = format!("{{\"column\":{{\"name\":{},\"type\":\"", text::json_string(&name));
        let tail = if optional { "\",\"optional\":true}}\n" } else { "\"}}\n" };
        let column_type = quote_spanned!(span=> <#ty as ::guest_sdk::row::RowField<#lifetime>>::TYPE);
        manifest.push(quote!(#head, ::guest_sdk::manifest::column_type(#column_type), #tail));
        specs.push(quote!(::guest_sdk::row::ColumnSpec { name: #name, ty: #column_type, optional: #optional }));
        reads.push(quote_spanned! {span=>
            #field_ident: <#ty as ::guest_sdk::row::RowField<#lifetime>>::field(row, #i, #name)
        });
        names.push(name);
    }
    Ok(quote! {
        impl<#lifetime> ::guest_sdk::row::FromRow<#lifetime> for #ident<#lifetime> {
            const MANIFEST: &'static [&'static str] = &[#(#manifest),*];
            const COLUMNS: &'static [::guest_sdk::row::ColumnSpec] = &[#(#specs),*];
            #[inline]
            fn from_row(row: &#lifetime ::guest_sdk::row::Row<#lifetime>) -> Self {
                #ident { #(#reads),* }
            }
        }
    })
}

pub fn output(input: DeriveInput) -> Result<TokenStream> {
    let lifetime = lifetime(&input)?;
    let generics = lifetime.as_ref().map(|lifetime| quote!(<#lifetime>));
    let ident = &input.ident;
    let (mut columns, mut writes, mut names) = (Vec::new(), Vec::new(), Vec::new());
    for (i, (field, field_ident)) in (0u16..).zip(fields(&input, "outputs")?) {
        let (ty, span) = (&field.ty, field.ty.span());
        let ColumnOptions { name, .. } = ColumnOptions::of(field, field_ident, false)?;
        if names.contains(&name) {
            return Err(Error::new_spanned(field_ident, format!("there is a column `{name}` already")));
        }
        columns.push(quote_spanned! {span=>
            (
                #name,
                <#ty as ::guest_sdk::output::OutputValue>::TYPE,
                <#ty as ::guest_sdk::output::OutputValue>::NULLABLE,
            )
        });
        writes.push(quote_spanned! {span=>
            <#ty as ::guest_sdk::output::OutputValue>::write(&self.#field_ident, image, #i);
        });
        names.push(name);
    }
    if names.is_empty() {
        return Err(Error::new_spanned(ident, "an output has at least one column"));
    }
    Ok(quote! {
        impl #generics ::guest_sdk::output::Output for #ident #generics {
            const COLUMNS: &'static [(&'static str, ::guest_sdk::__private::Type, bool)] = &[#(#columns),*];
            #[inline]
            fn write(&self, image: &mut ::guest_sdk::__private::ImageBuilder) {
                #(#writes)*
            }
        }
    })
}

/// The named fields of a struct; `what` is what it is meant to be.
fn fields<'i>(input: &'i DeriveInput, what: &str) -> Result<Vec<(&'i Field, &'i Ident)>> {
    let named = match &input.data {
        Data::Struct(data) => match &data.fields {
            Fields::Named(fields) => fields.named.iter().collect(),
            Fields::Unit => Vec::new(),
            Fields::Unnamed(_) => return Err(Error::new_spanned(&input.ident, format!("{what} need named fields"))),
        },
        _ => return Err(Error::new_spanned(&input.ident, format!("{what} are a struct with named fields"))),
    };
    if named.len() > MAX_COLUMNS {
        return Err(Error::new_spanned(&input.ident, format!("{what} have at most {MAX_COLUMNS} columns")));
    }
    Ok(named.into_iter().filter_map(|field| field.ident.as_ref().map(|ident| (field, ident))).collect())
}

/// The only generic that rows and outputs may have.
fn lifetime(input: &DeriveInput) -> Result<Option<Lifetime>> {
    let mut generics = input.generics.params.iter();
    match (generics.next(), generics.next()) {
        (None, _) => Ok(None),
        (Some(GenericParam::Lifetime(lifetime)), None) => Ok(Some(lifetime.lifetime.clone())),
        _ => Err(Error::new_spanned(&input.generics, "one lifetime is the only generic possible here")),
    }
}

struct ParamOptions {
    default: Option<Expr>,
}

impl ParamOptions {
    fn of(field: &Field) -> Result<Self> {
        let mut options = ParamOptions { default: None };
        for attribute in field.attrs.iter().filter(|attribute| attribute.path().is_ident("param")) {
            attribute.parse_nested_meta(|meta| {
                if meta.path.is_ident("default") {
                    options.default = Some(meta.value()?.parse()?);
                    return Ok(());
                }
                Err(meta.error("a parameter's only option is `default = …`"))
            })?;
        }
        Ok(options)
    }
}

struct ColumnOptions {
    name: String,
    optional: bool,
}

impl ColumnOptions {
    fn of(field: &Field, ident: &Ident, input: bool) -> Result<Self> {
        let mut options = ColumnOptions { name: text::name(ident), optional: false };
        for attribute in field.attrs.iter().filter(|attribute| attribute.path().is_ident("column")) {
            attribute.parse_nested_meta(|meta| {
                if meta.path.is_ident("name") {
                    options.name = meta.value()?.parse::<LitStr>()?.value();
                    return Ok(());
                }
                if input && meta.path.is_ident("optional") {
                    options.optional = true;
                    return Ok(());
                }
                let known = if input { "`name = \"…\"` and `optional`" } else { "`name = \"…\"`" };
                Err(meta.error(format!("a column's options are {known}")))
            })?;
        }
        Ok(options)
    }
}
