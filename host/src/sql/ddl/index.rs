//! CREATE and DROP INDEX, and UNIQUE in CREATE TABLE.

use std::sync::Arc;

use datafusion::sql::sqlparser::ast::{
    ColumnOption, CreateIndex, CreateTable, Expr, Ident, IndexColumn, NullsDistinctOption, ObjectName, OrderByOptions,
    TableConstraint, UniqueConstraint,
};
use wire::Type;

use super::{Ddl, MAX_NAME, check_name, fold, nothing, refuse, table_name};
use crate::catalog::{Catalog, Index, IndexId, IndexState, Table, TableKind};
use crate::sql::context::find_table;
use crate::sql::{DdlPlan, SqlError};
use crate::store::CatalogWrite;

/// Columns of one index, and indexes of one table: every write of a row makes an entry in each.
const MAX_COLUMNS: usize = 16;
const MAX_INDEXES: usize = 32;

impl Ddl<'_> {
    pub(super) fn create_index(&self, create: &CreateIndex) -> Result<DdlPlan, SqlError> {
        // CONCURRENTLY is how every index is built.
        refuse(&[
            (create.using.is_some(), "USING in CREATE INDEX"),
            (!create.include.is_empty(), "INCLUDE in CREATE INDEX"),
            (create.nulls_distinct == Some(false), "NULLS NOT DISTINCT"),
            (!create.with.is_empty(), "WITH in CREATE INDEX"),
            (create.predicate.is_some(), "WHERE in CREATE INDEX"),
            (!create.index_options.is_empty() || !create.alter_options.is_empty(), "options of CREATE INDEX"),
        ])?;
        let (namespace, name) = table_name(&create.table_name)?;
        let found = find_table(self.env, namespace.as_deref(), &name)?;
        let mut table = Table::clone(found);
        let columns = self.index_columns(&table, &create.columns)?;
        let name = match &create.name {
            Some(name) => self.index_name(name, &table)?,
            None => free_name(self.catalog, &table, &columns, if create.unique { "key" } else { "idx" }),
        };
        if let Some((_, index)) = self.catalog.index(&table.namespace_name, &name) {
            let message = format!("index {name:?} exists already in namespace {:?}", table.namespace_name);
            if create.if_not_exists {
                if !index.is_ready() {
                    // It may turn out that it cannot be: whoever is told that it is there has to find it.
                    let message = format!("index {name:?} is being built by an earlier request; ask again when it is");
                    return Err(SqlError::Busy(message));
                }
                return Ok(nothing(table.namespace, message));
            }
            return Err(SqlError::invalid("duplicate_index", message));
        }
        // A table of this very request has no rows. Any other may, and others may be writing to it.
        let is_new = self.env.snapshot.catalog().table_by_id(table.id).is_none();
        let state = if is_new { IndexState::Ready } else { IndexState::Building };
        let id = IndexId(self.catalog.next_table);
        let summary = format!("CREATE INDEX {}.{name}", table.namespace_name);
        add_index(&mut table, Index { id, name, columns, unique: create.unique, state })?;
        Ok(DdlPlan {
            build: (!is_new).then_some((table.id, id)),
            namespace: Some(table.namespace),
            writes: vec![CatalogWrite::PutTable(Arc::new(table))],
            summary,
        })
    }

    pub(super) fn drop_index(&self, name: &ObjectName, if_exists: bool) -> Result<DdlPlan, SqlError> {
        let (namespace, name) = table_name(name)?;
        let namespace = namespace.as_deref().unwrap_or(&self.env.namespace);
        let Some((table, index)) = self.catalog.index(namespace, &name) else {
            let message = format!("there is no index {name:?} in namespace {namespace:?}");
            if if_exists {
                return Ok(DdlPlan { summary: message, ..DdlPlan::default() });
            }
            return Err(SqlError::invalid("unknown_index", message));
        };
        let mut table = Table::clone(table);
        table.indexes.retain(|kept| kept.id != index.id);
        Ok(DdlPlan {
            summary: format!("DROP INDEX {namespace}.{name}"),
            namespace: Some(table.namespace),
            writes: vec![CatalogWrite::PutTable(Arc::new(table))],
            build: None,
        })
    }

    /// UNIQUE of columns and of the table, as indexes of a table that has its columns already.
    pub(super) fn unique_constraints(&self, create: &CreateTable, table: &mut Table) -> Result<(), SqlError> {
        let mut next = table.id.0;
        let mut add = |table: &mut Table, name: Option<&Ident>, columns: Vec<u16>| {
            let name = match name {
                Some(name) => fold(name),
                None => free_name(self.catalog, table, &columns, "key"),
            };
            check_name("index", &name)?;
            let taken = self.catalog.index(&table.namespace_name, &name).is_some();
            if taken || table.indexes.iter().any(|index| index.name == name) {
                let message = format!("index {name:?} exists already in namespace {:?}", table.namespace_name);
                return Err(SqlError::invalid("duplicate_index", message));
            }
            next += 1;
            add_index(table, Index { id: IndexId(next), name, columns, unique: true, state: IndexState::Ready })
        };
        for column in &create.columns {
            for option in &column.options {
                if let ColumnOption::Unique(unique) = &option.option {
                    plain_unique(unique)?;
                    let columns = named_columns(table, &[&column.name], self.text)?;
                    add(table, option.name.as_ref(), columns)?;
                }
            }
        }
        for constraint in &create.constraints {
            if let TableConstraint::Unique(unique) = constraint {
                plain_unique(unique)?;
                let columns = self.index_columns(table, &unique.columns)?;
                add(table, unique.name.as_ref(), columns)?;
            }
        }
        Ok(())
    }

    /// An index lies where its table does.
    fn index_name(&self, name: &ObjectName, table: &Table) -> Result<String, SqlError> {
        let (namespace, name) = table_name(name)?;
        if namespace.is_some_and(|namespace| namespace != table.namespace_name) {
            let message = format!("an index is in the namespace of its table, {:?}", table.namespace_name);
            return Err(SqlError::invalid("name", message));
        }
        check_name("index", &name)?;
        Ok(name)
    }

    fn index_columns(&self, table: &Table, columns: &[IndexColumn]) -> Result<Vec<u16>, SqlError> {
        let idents = columns.iter().map(plain_column).collect::<Result<Vec<_>, _>>()?;
        named_columns(table, &idents, self.text)
    }
}

fn named_columns(table: &Table, names: &[&Ident], text: &str) -> Result<Vec<u16>, SqlError> {
    let mut ids = Vec::with_capacity(names.len());
    for ident in names {
        let name = fold(ident);
        let column = table.column(&name).ok_or_else(|| {
            let message = format!("table {:?} has no column {name:?}", table.name);
            SqlError::invalid("unknown_column", message).at_span(text, ident.span)
        })?;
        if column.ty == Type::Json {
            return Err(SqlError::unsupported("a JSON column in an index", None).at_span(text, ident.span));
        }
        if ids.contains(&column.id) {
            let message = format!("the index names {name:?} twice");
            return Err(SqlError::invalid("duplicate_column", message).at_span(text, ident.span));
        }
        ids.push(column.id);
    }
    if ids.len() > MAX_COLUMNS {
        return Err(SqlError::Limit(format!("an index may have {MAX_COLUMNS} columns")));
    }
    Ok(ids)
}

fn add_index(table: &mut Table, index: Index) -> Result<(), SqlError> {
    if table.kind == TableKind::Stream {
        let hint = Some("its rows go by themselves, and an index would not hear of it");
        return Err(SqlError::unsupported("an index or UNIQUE on a stream table", hint));
    }
    if table.indexes.len() >= MAX_INDEXES {
        return Err(SqlError::Limit(format!("a table may have {MAX_INDEXES} indexes")));
    }
    table.indexes.push(Arc::new(index));
    Ok(())
}

/// Values sort one way in an index, and it is read in any.
fn plain_column(column: &IndexColumn) -> Result<&Ident, SqlError> {
    let OrderByOptions { asc, nulls_first } = &column.column.options;
    refuse(&[
        (*asc == Some(false), "DESC in an index"),
        (nulls_first.is_some(), "NULLS FIRST and NULLS LAST in an index"),
        (column.operator_class.is_some(), "an operator class"),
        (column.column.with_fill.is_some(), "WITH FILL"),
    ])?;
    match &column.column.expr {
        Expr::Identifier(ident) => Ok(ident),
        _ => Err(SqlError::unsupported("anything but column names in an index", None)),
    }
}

fn plain_unique(unique: &UniqueConstraint) -> Result<(), SqlError> {
    refuse(&[
        (unique.index_name.is_some() || !unique.index_type_display.is_none(), "UNIQUE KEY and UNIQUE INDEX"),
        (unique.index_type.is_some() || !unique.index_options.is_empty(), "index options of UNIQUE"),
        (unique.characteristics.is_some(), "DEFERRABLE"),
        (unique.nulls_distinct == NullsDistinctOption::NotDistinct, "NULLS NOT DISTINCT"),
    ])
}

/// `table_columns_key`, shortened to what a name may have, with a number behind it where it is taken.
fn free_name(catalog: &Catalog, table: &Table, columns: &[u16], ending: &str) -> String {
    let names = columns.iter().filter_map(|id| table.column_by_id(*id)).map(|column| column.name.as_str());
    let base = [table.name.as_str()].into_iter().chain(names).collect::<Vec<_>>().join("_");
    let taken = |name: &str| {
        catalog.index(&table.namespace_name, name).is_some() || table.indexes.iter().any(|index| index.name == name)
    };
    let named = |number: usize| {
        let ending = if number == 0 { format!("_{ending}") } else { format!("_{ending}{number}") };
        let cut = (0..=MAX_NAME - ending.len()).rev().find(|at| base.is_char_boundary(*at)).unwrap_or(0);
        base[..cut.min(base.len())].to_owned() + &ending
    };
    let mut number = 0;
    while taken(&named(number)) {
        number += 1;
    }
    named(number)
}
