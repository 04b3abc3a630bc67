//! From gated tokens to statements: the parser, and what it takes that we do not do.
//!
//! DataFusion's planner passes over some clauses in silence (FOR UPDATE, SAMPLE …). Those are refused here by name:
//! nothing is parsed and ignored.

use std::ops::ControlFlow;
use std::sync::Arc;

use datafusion::sql::sqlparser::ast::{
    self, DescribeAlias, Expr, ObjectName, Query, Select, SetExpr, TableFactor, Value, ValueWithSpan, Visit, Visitor,
    visit_expressions,
};
use datafusion::sql::sqlparser::parser::Parser;
use datafusion::sql::sqlparser::tokenizer::Span;

use super::dialect::Spoken;
use super::error::from_parser;
use super::functions::refused_function;
use super::gate::{self, Gated};
use super::planner::on_large_stack;
use super::{SqlError, Statement, StatementKind};

/// More than the gate lets through; the parser counts each bracket several times.
const PARSER_DEPTH: usize = 2_000;

pub(crate) fn parse(text: &str) -> Result<Vec<Statement>, SqlError> {
    let gated = gate::check(text)?;
    if gated.small { parse_gated(text, gated) } else { on_large_stack(|| parse_gated(text, gated))? }
}

fn parse_gated(text: &str, gated: Gated) -> Result<Vec<Statement>, SqlError> {
    let mut parser = Parser::new(&Spoken).with_recursion_limit(PARSER_DEPTH).with_tokens_with_locations(gated.tokens);
    let statements = parser.parse_statements().map_err(|error| from_parser(error, text))?;
    let (text, small, params): (Arc<str>, _, _) = (text.into(), gated.small, gated.params);
    let classified = statements.into_iter().enumerate().map(|(index, statement)| {
        let kind = classify(&statement, &text)?;
        Ok(Statement { kind, ast: Box::new(statement), text: text.clone(), index, small, params })
    });
    classified.collect()
}

fn classify(statement: &ast::Statement, text: &Arc<str>) -> Result<StatementKind, SqlError> {
    let kind = match statement {
        ast::Statement::Query(_) => StatementKind::Query,
        ast::Statement::ShowTables { terse, history, extended, full, external, show_options } => {
            let words = *terse || *history || *extended || *full || *external;
            if words || !show_options.to_string().is_empty() {
                let hint = Some("select from information_schema.tables");
                return Err(SqlError::unsupported("SHOW TABLES with options", hint));
            }
            StatementKind::Query
        }
        ast::Statement::ShowSchemas { terse, history, show_options } => {
            if *terse || *history || !show_options.to_string().is_empty() {
                let hint = Some("select from information_schema.schemata");
                return Err(SqlError::unsupported("SHOW NAMESPACES with options", hint));
            }
            StatementKind::Query
        }
        ast::Statement::ShowColumns { extended, full, show_options } => {
            if *extended || *full || super::show::shown_table(show_options).is_none() {
                let hint = Some("say SHOW COLUMNS FROM table, or select from information_schema.columns");
                return Err(SqlError::unsupported("this form of SHOW COLUMNS", hint));
            }
            StatementKind::Query
        }
        ast::Statement::Explain { options: Some(_), .. } => {
            return Err(SqlError::unsupported(
                "EXPLAIN with options in brackets",
                Some("say EXPLAIN ANALYZE SELECT …"),
            ));
        }
        ast::Statement::Explain { statement: inner, describe_alias, query_plan, estimate, .. } => {
            let plain = matches!(describe_alias, DescribeAlias::Explain) && !query_plan && !estimate;
            if !plain || !matches!(**inner, ast::Statement::Query(_)) {
                return Err(SqlError::unsupported("EXPLAIN of anything but a query", Some("say EXPLAIN SELECT …")));
            }
            StatementKind::Query
        }
        ast::Statement::ExplainTable { describe_alias, hive_format: None, .. }
            if !matches!(describe_alias, DescribeAlias::Explain) =>
        {
            StatementKind::Query
        }
        ast::Statement::Insert(_) | ast::Statement::Update(_) | ast::Statement::Delete(_) => StatementKind::Dml,
        ast::Statement::CreateTable(_)
        | ast::Statement::CreateIndex(_)
        | ast::Statement::CreateSchema { .. }
        | ast::Statement::AlterTable(_)
        | ast::Statement::Drop { .. } => StatementKind::Ddl,
        other => {
            let words: Vec<String> = other.to_string().split_whitespace().take(2).map(str::to_uppercase).collect();
            return Err(SqlError::unsupported(words.join(" "), None));
        }
    };
    if let ControlFlow::Break(error) = statement.visit(&mut Unsupported { text }) {
        return Err(error);
    }
    Ok(kind)
}

/// Walks a statement for clauses that would be ignored, table functions, and placeholders that are not `$1`.
struct Unsupported<'a> {
    text: &'a str,
}

impl Unsupported<'_> {
    fn refuse(&self, what: &str, span: Option<Span>) -> ControlFlow<SqlError> {
        self.refuse_with(what, None, span)
    }

    fn refuse_with(&self, what: &str, hint: Option<&str>, span: Option<Span>) -> ControlFlow<SqlError> {
        let error = SqlError::unsupported(what, hint);
        ControlFlow::Break(match span {
            Some(span) => error.at_span(self.text, span),
            None => error,
        })
    }

    /// The first of these that is there.
    fn refuse_first(&self, found: &[(bool, &str)], span: Option<Span>) -> ControlFlow<SqlError> {
        match found.iter().find(|(there, _)| *there) {
            Some((_, what)) => self.refuse(what, span),
            None => ControlFlow::Continue(()),
        }
    }

    fn function(&self, name: &ObjectName) -> ControlFlow<SqlError> {
        let Some(ident) = name.0.last().and_then(|part| part.as_ident()) else { return ControlFlow::Continue(()) };
        match refused_function(&ident.value.to_lowercase()) {
            Some(hint) => self.refuse_with(&format!("the function {}", ident.value), Some(hint), Some(ident.span)),
            None => ControlFlow::Continue(()),
        }
    }
}

impl Visitor for Unsupported<'_> {
    type Break = SqlError;

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<SqlError> {
        let dml =
            matches!(&*query.body, SetExpr::Insert(_) | SetExpr::Update(_) | SetExpr::Delete(_) | SetExpr::Merge(_));
        self.refuse_first(
            &[
                (dml, "INSERT, UPDATE or DELETE inside a query"),
                (matches!(&*query.body, SetExpr::Table(_)), "TABLE as a query"),
                (has_queries(&query.body), "a sub-query in VALUES (INSERT … SELECT takes them)"),
                (!query.locks.is_empty(), "FOR UPDATE and FOR SHARE"),
                (query.for_clause.is_some(), "FOR XML, JSON and BROWSE"),
                (query.settings.is_some(), "SETTINGS"),
                (query.format_clause.is_some(), "FORMAT"),
                (query.fetch.is_some(), "FETCH"),
                (!query.pipe_operators.is_empty(), "the pipe operator |>"),
            ],
            None,
        )
    }

    fn pre_visit_select(&mut self, select: &Select) -> ControlFlow<SqlError> {
        self.refuse_first(
            &[
                (select.into.is_some(), "SELECT INTO"),
                (select.top.is_some(), "TOP"),
                (select.prewhere.is_some(), "PREWHERE"),
                (!select.connect_by.is_empty(), "CONNECT BY"),
                (!select.optimizer_hints.is_empty(), "optimizer hints"),
                (select.select_modifiers.is_some(), "modifiers of SELECT"),
                (select.exclude.is_some(), "EXCLUDE after the SELECT list"),
                (select.value_table_mode.is_some(), "SELECT AS VALUE"),
                (!select.lateral_views.is_empty(), "LATERAL VIEW"),
                (!select.cluster_by.is_empty(), "CLUSTER BY"),
                (!select.distribute_by.is_empty(), "DISTRIBUTE BY"),
                (!select.sort_by.is_empty(), "SORT BY"),
            ],
            Some(select.select_token.0.span),
        )
    }

    fn pre_visit_table_factor(&mut self, factor: &TableFactor) -> ControlFlow<SqlError> {
        match factor {
            TableFactor::Table {
                name,
                args,
                with_hints,
                version,
                with_ordinality,
                partitions,
                json_path,
                sample,
                index_hints,
                ..
            } => {
                let span = name.0.first().and_then(|part| part.as_ident()).map(|ident| ident.span);
                if args.is_some() {
                    self.function(name)?;
                    return self.refuse(&format!("the table function {name}"), span);
                }
                self.refuse_first(
                    &[
                        (!with_hints.is_empty() || !index_hints.is_empty(), "table hints"),
                        (version.is_some(), "a table at another time"),
                        (*with_ordinality, "WITH ORDINALITY"),
                        (!partitions.is_empty(), "PARTITION of a table"),
                        (json_path.is_some(), "a JSON path as a table"),
                        (sample.is_some(), "TABLESAMPLE"),
                    ],
                    span,
                )
            }
            TableFactor::Derived { sample: Some(_), .. } => self.refuse("TABLESAMPLE", None),
            TableFactor::TableFunction { .. } => self.refuse("TABLE(…)", None),
            TableFactor::Function { name, .. } => self.refuse(&format!("the table function {name}"), None),
            _ => ControlFlow::Continue(()),
        }
    }

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<SqlError> {
        match expr {
            Expr::Function(function) if has_order(function) => {
                let hint = Some("its result has none: leave the ORDER BY out");
                self.refuse_with(&format!("an order in {}()", function.name), hint, None)
            }
            Expr::Function(function) => self.function(&function.name),
            Expr::SimilarTo { .. } => {
                self.refuse_with("SIMILAR TO", Some("use LIKE, or ~ with a regular expression"), None)
            }
            _ => ControlFlow::Continue(()),
        }
    }

    fn pre_visit_value(&mut self, value: &ValueWithSpan) -> ControlFlow<SqlError> {
        match &value.value {
            Value::Placeholder(name) if name.strip_prefix('$').is_none_or(|n| n.parse::<u16>().is_err()) => {
                let hint = Some("number the parameters: $1, $2, …");
                self.refuse_with(&format!("the placeholder {name}"), hint, Some(value.span))
            }
            _ => ControlFlow::Continue(()),
        }
    }
}

/// An order for an aggregate that makes nothing of it: some take it for another argument.
fn has_order(function: &ast::Function) -> bool {
    const ORDERED: [&str; 4] = ["array_agg", "first_value", "last_value", "nth_value"];
    let ast::FunctionArguments::List(list) = &function.args else { return false };
    list.clauses.iter().any(|clause| matches!(clause, ast::FunctionArgumentClause::OrderBy(_)))
        && !ORDERED.contains(&function.name.to_string().to_lowercase().as_str())
}

/// The planner makes constants of VALUES before it runs anything.
fn has_queries(body: &SetExpr) -> bool {
    let SetExpr::Values(values) = body else { return false };
    let found = visit_expressions(&values.rows, |expr| match expr {
        Expr::Subquery(_) | Expr::InSubquery { .. } | Expr::Exists { .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    found.is_break()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(text: &str) -> String {
        match parse(text) {
            Ok(statements) => statements.iter().map(|s| format!("{:?} ", s.kind)).collect::<String>().trim().to_owned(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn what_is_taken_and_what_is_refused() {
        let cases = [
            ("SELECT * FROM a.b WHERE c = $1 LIMIT 3", "Query"),
            ("INSERT INTO t VALUES (1); UPDATE t SET a = 1; DELETE FROM t", "Dml Dml Dml"),
            ("CREATE TABLE t (a INT); DROP TABLE t; CREATE NAMESPACE x; DROP SCHEMA x", "Ddl Ddl Ddl Ddl"),
            ("EXPLAIN SELECT 1", "Query"),
            ("EXPLAIN ANALYZE VERBOSE SELECT 1", "Query"),
            ("DESCRIBE t", "Query"),
            ("SHOW TABLES", "Query"),
            ("SHOW NAMESPACES", "Query"),
            ("SHOW COLUMNS FROM a.b", "Query"),
            (
                "SHOW COLUMNS FROM t LIKE 'x'",
                "this form of SHOW COLUMNS is not supported: say SHOW COLUMNS FROM table, or select from \
                 information_schema.columns",
            ),
            (
                "SHOW TABLES LIKE 'x'",
                "SHOW TABLES with options is not supported: select from information_schema.tables",
            ),
            ("EXPLAIN DELETE FROM t", "EXPLAIN of anything but a query is not supported: say EXPLAIN SELECT …"),
            ("SELECT a INTO b FROM t", "SELECT INTO is not supported"),
            ("SELECT a FROM t FOR UPDATE", "FOR UPDATE and FOR SHARE is not supported"),
            ("SELECT * FROM t TABLESAMPLE (10 PERCENT)", "TABLESAMPLE is not supported"),
            ("SELECT * FROM read_csv('/etc/passwd')", "the table function read_csv is not supported"),
            ("SELECT a FROM t WHERE a = ?", "the placeholder ? is not supported: number the parameters: $1, $2, …"),
            ("SELECT a SIMILAR TO 'b%'", "SIMILAR TO is not supported: use LIKE, or ~ with a regular expression"),
            (
                "EXPLAIN (ANALYZE) SELECT 1",
                "EXPLAIN with options in brackets is not supported: say EXPLAIN ANALYZE SELECT …",
            ),
            ("SELECT $x", "the placeholder $x is not supported: number the parameters: $1, $2, …"),
        ];
        for (text, expected) in cases {
            assert_eq!(outcome(text), expected, "{text}");
        }
        assert!(outcome("SELECT * FROM generate_series(1, 1000000000)").starts_with("the function generate_series is"));
        assert!(outcome("SELECT array_repeat(1, 9)").starts_with("the function array_repeat is not supported"));
        let Err(SqlError::Invalid { position, code: "syntax", .. }) = parse("SELECT 1 FROM") else { panic!() };
        assert!(position.is_some());
    }

    #[test]
    fn the_deepest_that_passes_the_gate_is_parsed_and_dropped() {
        let chain = format!("SELECT a{}", "+a".repeat(400));
        let nested = format!("SELECT {}1{}", "(".repeat(50), ")".repeat(50));
        assert_eq!((outcome(&chain).as_str(), outcome(&nested).as_str()), ("Query", "Query"));
    }
}
