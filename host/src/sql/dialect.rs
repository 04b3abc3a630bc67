//! The SQL that is spoken: sqlparser's generic dialect, where two operators bind otherwise.
//!
//! - `a IS DISTINCT FROM b AND c` is `(a IS DISTINCT FROM b) AND c`. sqlparser takes all that follows for `b`.
//! - `j ->> 'k' = 'v'` is `(j ->> 'k') = 'v'`, and so with every operator but `::` and subscripts. There the arrows bind
//!   more loosely than anything that is written beside them.
//!
//! A dialect is a list of what is parsed. This one has the generic dialect's: what we do not do is to be understood and
//! refused by name. What a later sqlparser adds to it is a syntax error until it is added here.

use std::any::TypeId;

use datafusion::sql::sqlparser::ast::Expr;
use datafusion::sql::sqlparser::dialect::{Dialect, GenericDialect};
use datafusion::sql::sqlparser::keywords::Keyword;
use datafusion::sql::sqlparser::parser::{Parser, ParserError};
use datafusion::sql::sqlparser::tokenizer::Token;

#[derive(Debug)]
pub(crate) struct Spoken;

/// Between `::` (50) and `AT TIME ZONE` (41), `*` and `||` (40).
const ARROW: u8 = 45;

macro_rules! yes {
    ($($name:ident)*) => {
        $(fn $name(&self) -> bool {
            true
        })*
    };
}

impl Dialect for Spoken {
    /// The parser asks in places which dialect it is.
    fn dialect(&self) -> TypeId {
        TypeId::of::<GenericDialect>()
    }

    fn is_delimited_identifier_start(&self, ch: char) -> bool {
        GenericDialect.is_delimited_identifier_start(ch)
    }

    fn is_identifier_start(&self, ch: char) -> bool {
        GenericDialect.is_identifier_start(ch)
    }

    fn is_identifier_part(&self, ch: char) -> bool {
        GenericDialect.is_identifier_part(ch)
    }

    yes! {
        supports_unicode_string_literal
        supports_partition_by_after_order_by
        supports_array_join_syntax
        supports_group_by_expr
        supports_group_by_with_modifier
        supports_left_associative_joins_without_parens
        supports_connect_by
        supports_match_recognize
        supports_pipe_operator
        supports_start_transaction_modifier
        supports_window_function_null_treatment_arg
        supports_dictionary_syntax
        supports_window_clause_named_window_reference
        supports_parenthesized_set_variables
        supports_select_wildcard_except
        support_map_literal_syntax
        allow_extract_custom
        allow_extract_single_quotes
        supports_extract_comma_syntax
        supports_create_view_comment_syntax
        supports_parens_around_table_factor
        supports_values_as_table_factor
        supports_create_index_with_clause
        supports_explain_with_utility_options
        supports_limit_comma
        supports_update_order_by
        supports_from_first_select
        supports_projection_trailing_commas
        supports_asc_desc_in_column_definition
        supports_try_convert
        supports_bitwise_shift_operators
        supports_comment_on
        supports_load_extension
        supports_named_fn_args_with_assignment_operator
        supports_struct_literal
        supports_empty_projections
        supports_nested_comments
        supports_multiline_comment_hints
        supports_user_host_grantee
        supports_string_escape_constant
        supports_array_typedef_with_brackets
        supports_match_against
        supports_set_names
        supports_comma_separated_set_assignments
        supports_filter_during_aggregation
        supports_select_wildcard_exclude
        supports_data_type_signed_suffix
        supports_interval_options
        supports_quote_delimited_string
        supports_select_wildcard_replace
        supports_select_wildcard_ilike
        supports_select_wildcard_rename
        supports_optimize_table
        supports_install
        supports_detach
        supports_prewhere
        supports_with_fill
        supports_limit_by
        supports_interpolate
        supports_settings
        supports_select_format
        supports_comment_optimizer_hint
        supports_constraint_keyword_without_name
        supports_key_column_option
        supports_comma_separated_trim
        supports_cte_without_as
        supports_select_item_multi_column_alias
        supports_xml_expressions
    }

    fn parse_infix(&self, parser: &mut Parser, left: &Expr, precedence: u8) -> Option<Result<Expr, ParserError>> {
        let negated = if parser.parse_keywords(&[Keyword::IS, Keyword::DISTINCT, Keyword::FROM]) {
            false
        } else if parser.parse_keywords(&[Keyword::IS, Keyword::NOT, Keyword::DISTINCT, Keyword::FROM]) {
            true
        } else {
            return None;
        };
        let left = Box::new(left.clone());
        Some(parser.parse_subexpr(precedence).map(Box::new).map(|right| match negated {
            false => Expr::IsDistinctFrom(left, right),
            true => Expr::IsNotDistinctFrom(left, right),
        }))
    }

    fn get_next_precedence(&self, parser: &Parser) -> Option<Result<u8, ParserError>> {
        let is_arrow = matches!(
            parser.peek_token_ref().token,
            Token::Arrow | Token::LongArrow | Token::HashArrow | Token::HashLongArrow
        );
        is_arrow.then_some(Ok(ARROW))
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use datafusion::sql::sqlparser::ast::visit_expressions_mut;

    use super::*;

    fn expression(text: &str) -> Expr {
        Parser::new(&Spoken).try_with_sql(text).unwrap().parse_expr().unwrap()
    }

    /// DELETE … WHERE b IS DISTINCT FROM true AND id = 99 deleted every row whose b was not true.
    #[test]
    fn operators_bind_as_they_are_read() {
        for (text, meant) in [
            ("a IS DISTINCT FROM b AND c", "(a IS DISTINCT FROM b) AND c"),
            ("x OR a IS DISTINCT FROM b AND c OR d", "(x OR ((a IS DISTINCT FROM b) AND c)) OR d"),
            ("NOT a IS NOT DISTINCT FROM b OR c", "(NOT (a IS NOT DISTINCT FROM b)) OR c"),
            ("a IS DISTINCT FROM b + 1 = 2", "a IS DISTINCT FROM ((b + 1) = 2)"),
            ("a IS DISTINCT FROM b IN (1, 2) AND c", "(a IS DISTINCT FROM (b IN (1, 2))) AND c"),
            (
                "a + 1 IS DISTINCT FROM CASE WHEN b THEN c END OR d",
                "((a + 1) IS DISTINCT FROM CASE WHEN b THEN c END) OR d",
            ),
            ("a IS DISTINCT FROM b IS DISTINCT FROM c", "(a IS DISTINCT FROM b) IS DISTINCT FROM c"),
            ("j ->> 'k' = 'v' AND c", "((j ->> 'k') = 'v') AND c"),
            ("j -> 'a' ->> 'b' || 'c'", "((j -> 'a') ->> 'b') || 'c'"),
            ("j ->> 'k' IS NULL", "(j ->> 'k') IS NULL"),
            ("j ->> 'k' LIKE 'v%'", "(j ->> 'k') LIKE 'v%'"),
            ("j ->> 'k' IN ('a') OR c", "((j ->> 'k') IN ('a')) OR c"),
            ("a < j ->> 'n' * 2", "a < ((j ->> 'n') * 2)"),
            ("NOT j -> 'k' BETWEEN 1 AND 2", "NOT ((j -> 'k') BETWEEN 1 AND 2)"),
            ("j -> 1::int", "j -> (1::int)"),
        ] {
            assert_eq!(expression(text), without_brackets(expression(meant)), "{text}");
        }
    }

    fn without_brackets(mut expr: Expr) -> Expr {
        let _done = visit_expressions_mut(&mut expr, |expr| {
            while let Expr::Nested(inner) = expr {
                *expr = *inner.clone();
            }
            ControlFlow::<()>::Continue(())
        });
        expr
    }
}
