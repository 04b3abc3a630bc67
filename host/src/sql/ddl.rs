//! CREATE, ALTER and DROP of tables, indexes and namespaces, as what they write to the catalog.
//!
//! Only syntax and the catalog snapshot are looked at. Every clause that is not done here is refused by name.

mod alter;
mod index;

use std::sync::Arc;

use ::arrow::array::{ArrayRef, BinaryArray, BooleanArray, StringArray};
use datafusion::sql::sqlparser::ast::helpers::stmt_create_table::CreateTableBuilder;
use datafusion::sql::sqlparser::ast::{
    self, ColumnDef, ColumnOption, CreateTable, CreateTableOptions, DataType, ExactNumberInfo, Expr, FunctionArguments,
    Ident, IndexColumn, ObjectName, ObjectType, PrimaryKeyConstraint, SchemaName, SqlOption, TableConstraint,
    UnaryOperator,
};
use wire::image::MAX_COLUMNS;
use wire::{Type, Value};

use super::arrow::{CastTarget, cast_for, value_at};
use super::error::offset;
use super::information::{CATALOG_NAME, INFORMATION_SCHEMA};
use super::{DdlPlan, RequestEnv, SqlError, Statement};
use crate::catalog::{
    Catalog, Column, DEFAULT_NAMESPACE, DefaultValue, GENERATED_KEY, Namespace, NamespaceId, Table, TableId, TableKind,
};
use crate::store::CatalogWrite;

const MAX_NAME: usize = 63;
/// Namespaces that the server itself speaks for.
const RESERVED: &[&str] = &[INFORMATION_SCHEMA, "system", CATALOG_NAME];

pub(crate) fn plan(statement: &Statement, env: &RequestEnv) -> Result<DdlPlan, SqlError> {
    let ddl = Ddl { env, catalog: &env.catalog, text: &statement.text };
    match &*statement.ast {
        ast::Statement::CreateTable(create) => ddl.create_table(create),
        ast::Statement::CreateIndex(create) => ddl.create_index(create),
        ast::Statement::CreateSchema { schema_name, if_not_exists, with, options, default_collate_spec, clone } => {
            let extras = with.is_some() || options.is_some() || default_collate_spec.is_some() || clone.is_some();
            ddl.create_namespace(schema_name, *if_not_exists, extras)
        }
        ast::Statement::Drop { object_type, if_exists, names, cascade, purge, temporary, table, .. } => {
            let [name] = names.as_slice() else {
                return Err(SqlError::unsupported("DROP of several at once", Some("send one DROP for each")));
            };
            refuse(&[(*cascade, "CASCADE"), (*purge, "PURGE"), (*temporary, "TEMPORARY"), (table.is_some(), "ON")])?;
            match object_type {
                ObjectType::Table => ddl.drop_table(name, *if_exists),
                ObjectType::Schema => ddl.drop_namespace(name, *if_exists),
                ObjectType::Index => ddl.drop_index(name, *if_exists),
                other => Err(SqlError::unsupported(format!("DROP {other}"), None)),
            }
        }
        ast::Statement::AlterTable(alter) => ddl.alter_table(alter),
        other => Err(SqlError::Internal(format!("not DDL: {other}"))),
    }
}

/// Kind of statement and name as it was written, for somebody who may not: nothing is looked up.
pub(crate) fn named(statement: &Statement) -> (&'static str, String) {
    let (what, name) = match &*statement.ast {
        ast::Statement::CreateTable(create) => ("CREATE TABLE", Some(&create.name)),
        ast::Statement::CreateIndex(create) => ("CREATE INDEX", Some(&create.table_name)),
        ast::Statement::CreateSchema { schema_name: SchemaName::Simple(name), .. } => ("CREATE NAMESPACE", Some(name)),
        ast::Statement::AlterTable(alter) => ("ALTER TABLE", Some(&alter.name)),
        ast::Statement::Drop { object_type: ObjectType::Table, names, .. } => ("DROP TABLE", names.first()),
        ast::Statement::Drop { object_type: ObjectType::Schema, names, .. } => ("DROP NAMESPACE", names.first()),
        ast::Statement::Drop { object_type: ObjectType::Index, names, .. } => ("DROP INDEX", names.first()),
        _ => ("DDL", None),
    };
    let parts = name.into_iter().flat_map(|name| name.0.iter().filter_map(|part| part.as_ident().map(fold)));
    (what, parts.collect::<Vec<_>>().join("."))
}

/// Folded to lower case unless quoted, as DataFusion does it everywhere else.
pub(crate) fn fold(ident: &Ident) -> String {
    if ident.quote_style.is_some() { ident.value.clone() } else { ident.value.to_lowercase() }
}

/// Namespace, if said, and name of a table.
pub(crate) fn table_name(name: &ObjectName) -> Result<(Option<String>, String), SqlError> {
    let parts: Option<Vec<String>> = name.0.iter().map(|part| part.as_ident().map(fold)).collect();
    match parts.as_deref() {
        Some([table]) => Ok((None, table.clone())),
        Some([namespace, table]) => Ok((Some(namespace.clone()), table.clone())),
        Some([catalog, namespace, table]) if catalog == CATALOG_NAME => Ok((Some(namespace.clone()), table.clone())),
        _ => Err(SqlError::invalid("syntax", format!("{name} is no table name: say table or namespace.table"))),
    }
}

fn refuse(found: &[(bool, &str)]) -> Result<(), SqlError> {
    match found.iter().find(|(there, _)| *there) {
        Some((_, what)) => Err(SqlError::unsupported(*what, None)),
        None => Ok(()),
    }
}

fn check_name(kind: &str, name: &str) -> Result<(), SqlError> {
    if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
        let message = format!("{name:?} cannot name a {kind}: 1 to {MAX_NAME} bytes without control characters");
        return Err(SqlError::invalid("name", message));
    }
    Ok(())
}

struct Ddl<'a> {
    env: &'a RequestEnv,
    catalog: &'a Catalog,
    text: &'a str,
}

impl Ddl<'_> {
    fn create_namespace(&self, name: &SchemaName, if_not_exists: bool, extras: bool) -> Result<DdlPlan, SqlError> {
        let SchemaName::Simple(name) = name else { return Err(SqlError::unsupported("AUTHORIZATION", None)) };
        refuse(&[(extras, "options of CREATE NAMESPACE")])?;
        let name = self.namespace_name(name)?;
        if RESERVED.contains(&name.as_str()) {
            return Err(SqlError::invalid("name", format!("the namespace {name:?} is reserved")));
        }
        check_name("namespace", &name)?;
        if let Some(existing) = self.catalog.namespace(&name) {
            if if_not_exists {
                return Ok(nothing(existing.id, format!("namespace {name} exists already")));
            }
            return Err(SqlError::invalid("duplicate_namespace", format!("namespace {name:?} exists already")));
        }
        let id = NamespaceId(self.catalog.next_namespace);
        let summary = format!("CREATE NAMESPACE {name}");
        let writes = vec![CatalogWrite::PutNamespace { id, name }];
        Ok(DdlPlan { writes, namespace: Some(id), summary, build: None })
    }

    fn drop_namespace(&self, name: &ObjectName, if_exists: bool) -> Result<DdlPlan, SqlError> {
        let name = self.namespace_name(name)?;
        let Some(namespace) = self.catalog.namespace(&name) else {
            if if_exists {
                return Ok(DdlPlan { summary: format!("there is no namespace {name}"), ..DdlPlan::default() });
            }
            return Err(SqlError::invalid("unknown_namespace", format!("there is no namespace {name:?}")));
        };
        if name == DEFAULT_NAMESPACE {
            return Err(SqlError::invalid("name", format!("the namespace {name:?} cannot be dropped")));
        }
        if !namespace.tables.is_empty() || !namespace.plugins.is_empty() {
            let (tables, plugins) = (namespace.tables.len(), namespace.plugins.len());
            let message =
                format!("namespace {name:?} is not empty ({tables} tables, {plugins} plugins): drop those first");
            return Err(SqlError::constraint("not_empty", message));
        }
        let summary = format!("DROP NAMESPACE {name}");
        let writes = vec![CatalogWrite::DropNamespace { name }];
        Ok(DdlPlan { writes, namespace: Some(namespace.id), summary, build: None })
    }

    fn drop_table(&self, name: &ObjectName, if_exists: bool) -> Result<DdlPlan, SqlError> {
        let (namespace, name) = table_name(name)?;
        match super::context::find_table(self.env, namespace.as_deref(), &name) {
            Ok(table) => Ok(DdlPlan {
                writes: vec![CatalogWrite::DropTable(table.id)],
                namespace: Some(table.namespace),
                summary: format!("DROP TABLE {}.{}", table.namespace_name, table.name),
                build: None,
            }),
            Err(_) if if_exists => Ok(DdlPlan { summary: format!("there is no table {name}"), ..DdlPlan::default() }),
            Err(error) => Err(error),
        }
    }

    fn create_table(&self, create: &CreateTable) -> Result<DdlPlan, SqlError> {
        refuse_extras(create)?;
        let (namespace, name) = table_name(&create.name)?;
        let namespace = self.namespace(namespace.as_deref().unwrap_or(&self.env.namespace))?;
        check_name("table", &name)?;
        if namespace.tables.contains_key(&name) {
            let message = format!("table {name:?} exists already in namespace {:?}", namespace.name);
            if create.if_not_exists {
                return Ok(nothing(namespace.id, message));
            }
            return Err(SqlError::invalid("duplicate_table", message));
        }
        let options = table_options(&create.table_options)?;
        let mut table = Table {
            id: TableId(self.catalog.next_table),
            namespace: namespace.id,
            namespace_name: namespace.name.clone(),
            name,
            kind: options.kind,
            schema_version: 1,
            columns: Vec::new(),
            key: Vec::new(),
            generated_key: false,
            next_column: 0,
            images_since: 1,
            ttl_micros: options.ttl_micros,
            indexes: Vec::new(),
        };
        self.columns(create, &mut table)?;
        table.next_column = table.slots();
        self.unique_constraints(create, &mut table)?;
        let summary = format!("CREATE TABLE {}.{}", table.namespace_name, table.name);
        let writes = vec![CatalogWrite::PutTable(Arc::new(table))];
        Ok(DdlPlan { writes, namespace: Some(namespace.id), summary, build: None })
    }

    fn columns(&self, create: &CreateTable, table: &mut Table) -> Result<(), SqlError> {
        let key = self.declared_key(create)?;
        if key.is_empty() {
            table.generated_key = true;
            table.columns.push(generated_key());
        }
        if create.columns.is_empty() {
            return Err(SqlError::invalid("syntax", "a table needs columns: CREATE TABLE name (column TYPE, …)"));
        }
        if create.columns.len() >= usize::from(MAX_COLUMNS) {
            return Err(SqlError::Limit(format!("a table may have {} columns", MAX_COLUMNS - 1)));
        }
        for declared in &create.columns {
            let id = table.slots();
            let column = self.column(declared, id).map_err(|error| error.at_span(self.text, declared.name.span))?;
            if table.column(&column.name).is_some() {
                let message = format!("column {:?} is there twice", column.name);
                return Err(SqlError::invalid("duplicate_column", message).at_span(self.text, declared.name.span));
            }
            table.columns.push(column);
        }
        self.set_key(table, &key)
    }

    fn set_key(&self, table: &mut Table, key: &[String]) -> Result<(), SqlError> {
        if key.is_empty() {
            table.key = vec![0];
            return Ok(());
        }
        for name in key {
            let column = table.columns.iter_mut().find(|column| column.name == *name).ok_or_else(|| {
                SqlError::invalid("unknown_column", format!("the primary key names {name:?}, which is no column"))
            })?;
            if column.ty == Type::Json {
                return Err(SqlError::unsupported("a JSON column in a primary key", None));
            }
            if table.key.contains(&column.id) {
                let message = format!("the primary key names {name:?} twice");
                return Err(SqlError::invalid("duplicate_column", message));
            }
            column.nullable = false;
            table.key.push(column.id);
        }
        Ok(())
    }

    /// The column names of PRIMARY KEY, inline or as a constraint.
    fn declared_key(&self, create: &CreateTable) -> Result<Vec<String>, SqlError> {
        let mut keys: Vec<Vec<String>> = Vec::new();
        for column in &create.columns {
            for option in &column.options {
                if let ColumnOption::PrimaryKey(key) = &option.option {
                    plain_key(key)?;
                    keys.push(vec![fold(&column.name)]);
                }
            }
        }
        for constraint in &create.constraints {
            match constraint {
                TableConstraint::PrimaryKey(key) => {
                    plain_key(key)?;
                    keys.push(key.columns.iter().map(key_column).collect::<Result<_, _>>()?);
                }
                TableConstraint::Unique(_) => {}
                TableConstraint::ForeignKey(_) => return Err(SqlError::unsupported("FOREIGN KEY", None)),
                TableConstraint::Check(_) => return Err(SqlError::unsupported("CHECK", None)),
                other => return Err(SqlError::unsupported(format!("the constraint {other}"), None)),
            }
        }
        if keys.len() > 1 {
            return Err(SqlError::invalid(
                "syntax",
                "a table has one primary key: for several columns, PRIMARY KEY (a, b)",
            ));
        }
        Ok(keys.pop().unwrap_or_default())
    }

    fn column(&self, declared: &ColumnDef, id: u16) -> Result<Column, SqlError> {
        let name = fold(&declared.name);
        check_name("column", &name)?;
        if name == GENERATED_KEY {
            return Err(SqlError::invalid("name", format!("the column name {GENERATED_KEY:?} is reserved")));
        }
        let ty = column_type(&declared.data_type)?;
        let mut column = Column { id, name, ty, nullable: true, default: None, fill: None };
        for option in &declared.options {
            self.option(&mut column, &option.option)?;
        }
        Ok(column)
    }

    fn option(&self, column: &mut Column, option: &ColumnOption) -> Result<(), SqlError> {
        match option {
            ColumnOption::Null => column.nullable = true,
            ColumnOption::NotNull => column.nullable = false,
            ColumnOption::PrimaryKey(_) | ColumnOption::Unique(_) => {}
            ColumnOption::Default(expr) => column.default = default_value(expr, column)?,
            ColumnOption::ForeignKey(_) => return Err(SqlError::unsupported("REFERENCES", None)),
            ColumnOption::Check(_) => return Err(SqlError::unsupported("CHECK", None)),
            ColumnOption::Collation(_) => return Err(SqlError::unsupported("COLLATE", None)),
            ColumnOption::Generated { .. } => return Err(SqlError::unsupported("GENERATED columns", None)),
            other => return Err(SqlError::unsupported(format!("the column option {other}"), None)),
        }
        Ok(())
    }

    fn namespace_name(&self, name: &ObjectName) -> Result<String, SqlError> {
        let span = name.0.first().and_then(|part| part.as_ident()).map(|ident| ident.span.start);
        match name.0.as_slice() {
            [part] => part.as_ident().map(fold),
            _ => None,
        }
        .ok_or_else(|| {
            let position = span.and_then(|start| offset(self.text, start));
            SqlError::invalid("syntax", format!("{name} is no namespace name")).at(position)
        })
    }

    fn namespace(&self, name: &str) -> Result<&Namespace, SqlError> {
        self.catalog
            .namespace(name)
            .ok_or_else(|| SqlError::invalid("unknown_namespace", format!("there is no namespace {name:?}")))
    }
}

fn nothing(namespace: NamespaceId, summary: String) -> DdlPlan {
    DdlPlan { writes: Vec::new(), namespace: Some(namespace), summary, build: None }
}

fn generated_key() -> Column {
    Column { id: 0, name: GENERATED_KEY.to_owned(), ty: Type::Uuid, nullable: false, default: None, fill: None }
}

/// Everything that `CREATE TABLE` could say beyond columns, constraints and `WITH (…)`.
fn refuse_extras(create: &CreateTable) -> Result<(), SqlError> {
    refuse(&[
        (create.or_replace, "OR REPLACE"),
        (create.temporary, "TEMPORARY"),
        (create.external, "EXTERNAL"),
        (create.query.is_some(), "CREATE TABLE … AS SELECT"),
        (create.like.is_some(), "LIKE"),
        (create.clone.is_some(), "CLONE"),
        (create.partition_by.is_some() || create.partition_of.is_some(), "PARTITION"),
        (create.inherits.is_some(), "INHERITS"),
        (create.without_rowid, "WITHOUT ROWID"),
        (create.on_commit.is_some(), "ON COMMIT"),
    ])?;
    let known = CreateTable {
        if_not_exists: false,
        columns: Vec::new(),
        constraints: Vec::new(),
        table_options: CreateTableOptions::None,
        ..create.clone()
    };
    // What is left must be nothing but the name.
    if known != CreateTableBuilder::new(create.name.clone()).build() {
        return Err(SqlError::unsupported("this form of CREATE TABLE", Some("say CREATE TABLE name (…) WITH (…)")));
    }
    Ok(())
}

/// What `WITH (…)` says.
struct TableOptions {
    kind: TableKind,
    ttl_micros: Option<i64>,
}

fn table_options(options: &CreateTableOptions) -> Result<TableOptions, SqlError> {
    let options = match options {
        CreateTableOptions::None => &[],
        CreateTableOptions::With(options) => options.as_slice(),
        _ => return Err(SqlError::unsupported("table options outside of WITH (…)", None)),
    };
    let (mut kind, mut ttl_micros) = (None, None);
    for option in options {
        let SqlOption::KeyValue { key, value } = option else {
            return Err(SqlError::unsupported(format!("the table option {option}"), None));
        };
        let value = match value {
            Expr::Value(value) => value.value.clone().into_string(),
            Expr::Identifier(ident) => Some(ident.value.clone()),
            _ => None,
        };
        let name = fold(key);
        let twice = match name.as_str() {
            "type" => kind.replace(table_kind(value.as_deref())?).is_some(),
            "ttl" => ttl_micros.replace(ttl(value.as_deref())?).is_some(),
            _ => {
                let hint = Some("there are type and ttl");
                return Err(SqlError::unsupported(format!("the table option {key}"), hint));
            }
        };
        if twice {
            return Err(SqlError::invalid("option", format!("the table option {name} is given twice")));
        }
    }
    let kind = kind.unwrap_or(TableKind::Shared);
    match (kind, ttl_micros) {
        (TableKind::Stream, None) => {
            Err(SqlError::invalid("option", "a stream table needs a time to live: WITH (type = 'stream', ttl = '1h')"))
        }
        (TableKind::Shared | TableKind::User, Some(_)) => {
            let message = "only rows of stream tables have a time to live: say type = 'stream', or leave ttl out";
            Err(SqlError::invalid("option", message))
        }
        _ => Ok(TableOptions { kind, ttl_micros }),
    }
}

fn table_kind(value: Option<&str>) -> Result<TableKind, SqlError> {
    match value.map(str::to_lowercase).as_deref() {
        Some("shared") => Ok(TableKind::Shared),
        Some("user") => Ok(TableKind::User),
        Some("stream") => Ok(TableKind::Stream),
        _ => Err(SqlError::invalid("option", "the table type is 'shared', 'user' or 'stream'")),
    }
}

/// A hundred years: beyond that, times to come do not fit what they are kept in.
const MAX_TTL_MILLIS: i64 = 100 * 365 * 86_400_000;

/// `'1h'` in microseconds.
fn ttl(value: Option<&str>) -> Result<i64, SqlError> {
    let parse = |text: &str| {
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit())?;
        let unit = match text[digits..].trim() {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return None,
        };
        let millis = text[..digits].parse::<i64>().ok()?.checked_mul(unit)?;
        (1..=MAX_TTL_MILLIS).contains(&millis).then_some(millis * 1_000)
    };
    value.and_then(parse).ok_or_else(|| {
        let message = "ttl is how long a row lives, up to a hundred years: a number and ms, s, m, h or d, as in '90s', \
                       '1h', '7d'";
        SqlError::invalid("option", message)
    })
}

fn plain_key(key: &PrimaryKeyConstraint) -> Result<(), SqlError> {
    refuse(&[
        (key.index_type.is_some() || !key.index_options.is_empty(), "index options of a primary key"),
        (key.characteristics.is_some(), "DEFERRABLE"),
    ])
}

fn key_column(column: &IndexColumn) -> Result<String, SqlError> {
    let plain = column.operator_class.is_none()
        && column.column.with_fill.is_none()
        && column.column.options == ast::OrderByOptions::default();
    match &column.column.expr {
        Expr::Identifier(ident) if plain => Ok(fold(ident)),
        _ => Err(SqlError::unsupported("anything but column names in a primary key", None)),
    }
}

fn column_type(ty: &DataType) -> Result<Type, SqlError> {
    let unknown = || {
        let hint = "there are BOOLEAN, SMALLINT, INT, BIGINT, REAL, DOUBLE, DECIMAL(p,s), TEXT, BYTEA, DATE, TIME, \
                    TIMESTAMP, UUID, JSON";
        SqlError::unsupported(format!("the type {ty}"), Some(hint))
    };
    Ok(match ty {
        DataType::Boolean | DataType::Bool => Type::Boolean,
        DataType::SmallInt(None) | DataType::Int2(None) => Type::SmallInt,
        DataType::Int(None) | DataType::Integer(None) | DataType::Int4(None) => Type::Int,
        DataType::BigInt(None) | DataType::Int8(None) => Type::BigInt,
        DataType::Real | DataType::Float4 => Type::Real,
        DataType::Double(ExactNumberInfo::None) | DataType::DoublePrecision | DataType::Float8 => Type::Double,
        DataType::Decimal(digits) | DataType::Numeric(digits) | DataType::Dec(digits) => decimal(digits)?,
        DataType::Text | DataType::Varchar(None) | DataType::String(None) | DataType::CharacterVarying(None) => {
            Type::Text
        }
        DataType::Bytea => Type::Bytea,
        DataType::Date => Type::Date,
        DataType::Time(None, ast::TimezoneInfo::None | ast::TimezoneInfo::WithoutTimeZone) => Type::Time,
        DataType::Timestamp(None, _) => Type::Timestamp,
        DataType::Uuid => Type::Uuid,
        DataType::JSON => Type::Json,
        DataType::Varchar(Some(_)) | DataType::CharacterVarying(Some(_)) | DataType::Char(_) => {
            return Err(SqlError::unsupported(format!("the type {ty}"), Some("TEXT has no length limit")));
        }
        _ => return Err(unknown()),
    })
}

fn decimal(digits: &ExactNumberInfo) -> Result<Type, SqlError> {
    let (precision, scale) = match digits {
        ExactNumberInfo::None => {
            return Err(SqlError::unsupported("DECIMAL without digits", Some("say DECIMAL(precision, scale)")));
        }
        ExactNumberInfo::Precision(precision) => (*precision, 0),
        ExactNumberInfo::PrecisionAndScale(precision, scale) => (*precision, *scale),
    };
    let precision = u8::try_from(precision).ok().filter(|precision| (1..=38).contains(precision));
    let scale = i8::try_from(scale).ok().filter(|scale| *scale >= 0);
    match (precision, scale) {
        (Some(precision), Some(scale)) if scale.unsigned_abs() <= precision => Ok(Type::Decimal { precision, scale }),
        _ => Err(SqlError::invalid("type", "DECIMAL(precision, scale): 1 to 38 digits, the scale at most as many")),
    }
}

/// A literal of the column's type, or one of the functions that are evaluated for each row.
fn default_value(expr: &Expr, column: &Column) -> Result<Option<DefaultValue>, SqlError> {
    if let Expr::Function(function) = expr
        && matches!(&function.args, FunctionArguments::None | FunctionArguments::List(_))
    {
        return default_function(&function.to_string().to_lowercase(), column).map(Some);
    }
    let target = CastTarget { name: &column.name, ty: column.ty };
    let cell: ArrayRef = match literal(expr) {
        Some(Literal::Null) => return Ok(None),
        Some(Literal::Bool(value)) => Arc::new(BooleanArray::from(vec![value])),
        Some(Literal::Text(text)) => Arc::new(StringArray::from(vec![text])),
        Some(Literal::Bytes(bytes)) => Arc::new(BinaryArray::from(vec![bytes.as_slice()])),
        // Digits go in as text: so that a DECIMAL gets all of them.
        Some(Literal::Number(digits)) if takes_numbers(column.ty) => Arc::new(StringArray::from(vec![digits])),
        Some(Literal::Number(digits)) => {
            let message = format!("column {:?} is {}, but its default is {digits}", column.name, column.ty);
            return Err(SqlError::invalid("type_mismatch", message));
        }
        None => {
            let hint = "there are literals, now(), uuid() and current_user";
            return Err(SqlError::unsupported(format!("DEFAULT {expr}"), Some(hint)));
        }
    };
    let value = value_at(&cast_for(&target, &cell)?, 0, column.ty);
    Ok((value != Value::Null).then_some(DefaultValue::Literal(value)))
}

fn takes_numbers(ty: Type) -> bool {
    matches!(
        ty,
        Type::SmallInt | Type::Int | Type::BigInt | Type::Real | Type::Double | Type::Decimal { .. } | Type::Text
    )
}

fn default_function(call: &str, column: &Column) -> Result<DefaultValue, SqlError> {
    let (default, fits) = match call {
        "now()" | "current_timestamp" | "current_timestamp()" => (DefaultValue::Now, column.ty == Type::Timestamp),
        "uuid()" => (DefaultValue::Uuid, matches!(column.ty, Type::Uuid | Type::Text)),
        "current_user" => (DefaultValue::CurrentUser, column.ty == Type::Text),
        _ => {
            let hint = "there are literals, now(), uuid() and current_user";
            return Err(SqlError::unsupported(format!("DEFAULT {call}"), Some(hint)));
        }
    };
    if !fits {
        let message = format!("DEFAULT {call} does not fit column {:?} ({})", column.name, column.ty);
        return Err(SqlError::invalid("type_mismatch", message));
    }
    Ok(default)
}

/// A constant as it is written.
pub(crate) enum Literal {
    Null,
    Bool(bool),
    Number(String),
    Text(String),
    Bytes(Vec<u8>),
}

pub(crate) fn literal(expr: &Expr) -> Option<Literal> {
    match expr {
        Expr::Value(value) => match &value.value {
            ast::Value::Null => Some(Literal::Null),
            ast::Value::Boolean(value) => Some(Literal::Bool(*value)),
            ast::Value::Number(digits, _) => Some(Literal::Number(digits.clone())),
            ast::Value::SingleQuotedString(text) => Some(Literal::Text(text.clone())),
            ast::Value::HexStringLiteral(hex) => super::arrow::unhex(hex).map(Literal::Bytes),
            _ => None,
        },
        Expr::TypedString(typed) => typed.value.value.clone().into_string().map(Literal::Text),
        Expr::UnaryOp { op: UnaryOperator::Minus, expr } => match literal(expr) {
            Some(Literal::Number(digits)) if !digits.starts_with('-') => Some(Literal::Number(format!("-{digits}"))),
            _ => None,
        },
        _ => None,
    }
}
