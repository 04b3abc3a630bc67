//! SHOW and DESCRIBE: as queries over `information_schema`, planned like any other.

use datafusion::sql::sqlparser::ast;
use wire::Type;

use super::context::find_table;
use super::ddl::table_name;
use super::system::SystemTables;
use super::{RequestEnv, SqlError, Statement, statement};
use crate::catalog::Table;

/// The query that answers the statement; `None`: it is none that shows something of the catalog.
pub(super) fn as_query(
    statement: &Statement,
    env: &RequestEnv,
    system: &SystemTables,
) -> Result<Option<ast::Statement>, SqlError> {
    let query = match &*statement.ast {
        ast::Statement::ShowTables { .. } => show_tables(&env.namespace)?,
        ast::Statement::ShowSchemas { .. } => show_namespaces()?,
        ast::Statement::ShowColumns { show_options, .. } => match shown_table(show_options) {
            Some(name) => describe(name, env, &statement.text, system)?,
            None => return Err(SqlError::Internal("SHOW COLUMNS of no table".to_owned())),
        },
        ast::Statement::ExplainTable { table_name, .. } => describe(table_name, env, &statement.text, system)?,
        _ => return Ok(None),
    };
    Ok(Some(query))
}

fn describe(
    name: &ast::ObjectName,
    env: &RequestEnv,
    text: &str,
    system: &SystemTables,
) -> Result<ast::Statement, SqlError> {
    let (namespace, table) = table_name(name)?;
    let home = namespace.as_deref().unwrap_or(&env.namespace);
    if SystemTables::is_home(home) {
        return describe_system(system.columns(home, &table)?);
    }
    let table = find_table(env, namespace.as_deref(), &table);
    let span = name.0.first().and_then(|part| part.as_ident()).map(|ident| ident.span);
    match (table, span) {
        (Ok(table), _) => describe_table(table),
        (Err(error), Some(span)) => Err(error.at_span(text, span)),
        (Err(error), None) => Err(error),
    }
}

fn show_tables(namespace: &str) -> Result<ast::Statement, SqlError> {
    internal_query(&format!(
        "SELECT table_schema AS namespace, table_name AS name, table_type AS type FROM information_schema.tables \
         ORDER BY table_schema <> {}, table_schema, table_name",
        ast::Value::SingleQuotedString(namespace.to_owned())
    ))
}

fn show_namespaces() -> Result<ast::Statement, SqlError> {
    internal_query("SELECT schema_name AS name FROM information_schema.schemata ORDER BY schema_name")
}

/// The table of SHOW COLUMNS, where it says nothing more.
pub(super) fn shown_table(options: &ast::ShowStatementOptions) -> Option<&ast::ObjectName> {
    let only_in = ast::ShowStatementOptions { show_in: None, ..options.clone() };
    let nothing = ast::ShowStatementOptions {
        show_in: None,
        starts_with: None,
        limit: None,
        limit_from: None,
        filter_position: None,
    };
    let shown = options.show_in.as_ref().filter(|shown| shown.parent_type.is_none() && only_in == nothing)?;
    shown.parent_name.as_ref()
}

fn describe_system(columns: &[(&str, Type)]) -> Result<ast::Statement, SqlError> {
    let quote = |text: &str| ast::Value::SingleQuotedString(text.to_owned()).to_string();
    let row = |(name, ty): &(&str, Type)| format!("({}, {})", quote(name), quote(&ty.to_string()));
    let rows: Vec<String> = columns.iter().map(row).collect();
    internal_query(&format!(
        "SELECT column_name, data_type, 'YES' AS is_nullable, CAST(NULL AS TEXT) AS column_default, 'NO' AS is_key \
         FROM (VALUES {}) AS columns (column_name, data_type)",
        rows.join(", ")
    ))
}

fn describe_table(table: &Table) -> Result<ast::Statement, SqlError> {
    let quote = |text: &str| ast::Value::SingleQuotedString(text.to_owned());
    internal_query(&format!(
        "SELECT column_name, data_type, is_nullable, column_default, is_key FROM information_schema.columns \
         WHERE table_schema = {} AND table_name = {} ORDER BY ordinal_position",
        quote(&table.namespace_name),
        quote(&table.name)
    ))
}

/// SQL of our own making, over the catalog alone.
fn internal_query(text: &str) -> Result<ast::Statement, SqlError> {
    let mut statements = statement::parse(text)?;
    let statement = statements.pop().ok_or_else(|| SqlError::Internal("an empty internal query".to_owned()))?;
    Ok(*statement.ast)
}
