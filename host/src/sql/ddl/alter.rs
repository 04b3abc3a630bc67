//! ALTER TABLE: the table's next version. No row is rewritten: rows carry the version they were written at, and older
//! ones are lifted when they are read (`store/rows.rs`), so what they lack has to be known here and now.

use std::sync::Arc;

use datafusion::sql::sqlparser::ast::{
    AlterTable, AlterTableOperation, ColumnDef, ColumnOption, DropBehavior, Ident, ObjectName, RenameTableNameKind,
};
use wire::Value;
use wire::image::MAX_COLUMNS;

use super::{Ddl, check_name, fold, nothing, refuse, table_name};
use crate::catalog::{Column, DefaultValue, GENERATED_KEY, Table, TableKind};
use crate::sql::context::find_table;
use crate::sql::{DdlPlan, SqlError};
use crate::store::CatalogWrite;

impl Ddl<'_> {
    pub(super) fn alter_table(&self, alter: &AlterTable) -> Result<DdlPlan, SqlError> {
        refuse(&[
            (alter.only, "ALTER TABLE ONLY"),
            (alter.location.is_some(), "SET LOCATION"),
            (alter.on_cluster.is_some(), "ON CLUSTER"),
            (alter.table_type.is_some(), "this kind of ALTER TABLE"),
        ])?;
        let (namespace, name) = table_name(&alter.name)?;
        let before = match find_table(self.env, namespace.as_deref(), &name) {
            Ok(table) => table,
            Err(SqlError::Invalid { code: "unknown_table", .. }) if alter.if_exists => {
                return Ok(DdlPlan { summary: format!("there is no table {name}"), ..DdlPlan::default() });
            }
            Err(error) => return Err(self.at_name(error, &alter.name)),
        };
        let mut table = Table::clone(before);
        for operation in &alter.operations {
            self.alter(&mut table, operation)?;
        }
        let summary = format!("ALTER TABLE {}.{}", before.namespace_name, before.name);
        if table == **before {
            return Ok(nothing(before.namespace, summary));
        }
        table.schema_version += 1;
        let ids = |table: &Table| table.columns.iter().map(|column| column.id).collect::<Vec<_>>();
        if ids(&table) != ids(before) {
            table.images_since = table.schema_version;
        }
        let writes = vec![CatalogWrite::PutTable(Arc::new(table))];
        Ok(DdlPlan { writes, namespace: Some(before.namespace), summary, build: None })
    }

    fn alter(&self, table: &mut Table, operation: &AlterTableOperation) -> Result<(), SqlError> {
        match operation {
            AlterTableOperation::AddColumn { if_not_exists, column_def, column_position, .. } => {
                refuse(&[(column_position.is_some(), "FIRST and AFTER in ADD COLUMN")])?;
                if *if_not_exists && table.column(&fold(&column_def.name)).is_some() {
                    return Ok(());
                }
                let added = self.added(table, column_def);
                let column = added.map_err(|error| error.at_span(self.text, column_def.name.span))?;
                table.next_column = column.id + 1;
                table.columns.push(column);
                Ok(())
            }
            AlterTableOperation::DropColumn { column_names, if_exists, drop_behavior, .. } => {
                refuse(&[(matches!(drop_behavior, Some(DropBehavior::Cascade)), "CASCADE")])?;
                let mut names = column_names.iter();
                names.try_for_each(|name| self.drop_column(table, name, *if_exists))
            }
            AlterTableOperation::RenameColumn { old_column_name, new_column_name } => {
                self.rename_column(table, old_column_name, new_column_name)
            }
            AlterTableOperation::RenameTable { table_name: RenameTableNameKind::To(name) } => {
                self.rename_table(table, name).map_err(|error| self.at_name(error, name))
            }
            other => {
                let words: Vec<String> = other.to_string().split_whitespace().take(2).map(str::to_uppercase).collect();
                let hint = "there are ADD COLUMN, DROP COLUMN, RENAME COLUMN … TO and RENAME TO";
                Err(SqlError::unsupported(format!("ALTER TABLE … {}", words.join(" ")), Some(hint)))
            }
        }
    }

    fn added(&self, table: &Table, declared: &ColumnDef) -> Result<Column, SqlError> {
        for option in &declared.options {
            let (what, hint) = match &option.option {
                ColumnOption::PrimaryKey(_) => ("PRIMARY KEY", "the key is chosen when the table is made"),
                ColumnOption::Unique(_) => ("UNIQUE", "add the column, then CREATE UNIQUE INDEX"),
                _ => continue,
            };
            return Err(SqlError::unsupported(format!("{what} in ADD COLUMN"), Some(hint)));
        }
        if table.next_column >= MAX_COLUMNS {
            let message = format!(
                "table {:?} has had {MAX_COLUMNS} columns, dropped ones included, and there can be no more: move its \
                 rows to a new table",
                table.name
            );
            return Err(SqlError::Limit(message));
        }
        let mut column = self.column(declared, table.next_column)?;
        if table.column(&column.name).is_some() {
            return Err(already(table, &column.name));
        }
        column.fill = self.fill(table, &column)?;
        if !column.nullable && column.fill.is_none() {
            let message = format!(
                "column {:?} is NOT NULL, but rows stored before it have no value for it: say DEFAULT …, or leave NOT \
                 NULL out",
                column.name
            );
            return Err(SqlError::invalid("not_null", message));
        }
        Ok(column)
    }

    /// What the rows that are there have in the new column: its default, evaluated once for all of them.
    fn fill(&self, table: &Table, column: &Column) -> Result<Option<Value>, SqlError> {
        match &column.default {
            None => Ok(None),
            Some(DefaultValue::Literal(value)) => Ok(Some(value.clone())),
            Some(DefaultValue::Now) => Ok(Some(Value::Int(self.env.now))),
            Some(DefaultValue::CurrentUser) if table.kind != TableKind::User => {
                Ok(Some(Value::Text(self.env.user.to_string())))
            }
            Some(DefaultValue::CurrentUser | DefaultValue::Uuid) => {
                let hint = "each row that is there would need its own value: add the column without a default";
                let what = if column.default == Some(DefaultValue::Uuid) { "uuid()" } else { "current_user" };
                Err(SqlError::unsupported(format!("DEFAULT {what} in ADD COLUMN"), Some(hint)))
            }
        }
    }

    fn drop_column(&self, table: &mut Table, name: &Ident, if_exists: bool) -> Result<(), SqlError> {
        let Some(column) = table.column(&fold(name)) else {
            return if if_exists { Ok(()) } else { Err(self.no_column(table, name)) };
        };
        if table.is_key(column.id) {
            let what = format!("dropping column {:?}, which is part of the primary key,", column.name);
            return Err(SqlError::unsupported(what, None).at_span(self.text, name.span));
        }
        let id = column.id;
        if let Some(index) = table.indexes.iter().find(|index| index.columns.contains(&id)) {
            let what = format!("dropping column {:?}, which is in index {:?},", column.name, index.name);
            return Err(SqlError::unsupported(what, Some("drop the index first")).at_span(self.text, name.span));
        }
        if table.columns.iter().all(|column| column.id == id || column.name == GENERATED_KEY) {
            let message = format!("column {:?} is the last of table {:?}: drop the table", fold(name), table.name);
            return Err(SqlError::invalid("last_column", message).at_span(self.text, name.span));
        }
        table.columns.retain(|column| column.id != id);
        Ok(())
    }

    fn rename_column(&self, table: &mut Table, old: &Ident, new: &Ident) -> Result<(), SqlError> {
        let name = fold(new);
        let at = table.columns.iter().position(|column| column.name == fold(old));
        let at = at.ok_or_else(|| self.no_column(table, old))?;
        let is_free = || {
            check_name("column", &name)?;
            if [table.columns[at].name.as_str(), &name].contains(&GENERATED_KEY) {
                return Err(SqlError::invalid("name", format!("the column name {GENERATED_KEY:?} is reserved")));
            }
            match table.column(&name) {
                Some(_) => Err(already(table, &name)),
                None => Ok(()),
            }
        };
        is_free().map_err(|error| error.at_span(self.text, new.span))?;
        table.columns[at].name = name;
        Ok(())
    }

    fn rename_table(&self, table: &mut Table, to: &ObjectName) -> Result<(), SqlError> {
        let (namespace, name) = table_name(to)?;
        if namespace.is_some_and(|namespace| namespace != table.namespace_name) {
            let hint = Some("a table stays in its namespace");
            return Err(SqlError::unsupported("RENAME TO another namespace", hint));
        }
        check_name("table", &name)?;
        if self.catalog.table(&table.namespace_name, &name).is_some() {
            let message = format!("table {name:?} exists already in namespace {:?}", table.namespace_name);
            return Err(SqlError::invalid("duplicate_table", message));
        }
        table.name = name;
        Ok(())
    }

    fn no_column(&self, table: &Table, name: &Ident) -> SqlError {
        let known: Vec<&str> = table.columns.iter().take(40).map(|column| column.name.as_str()).collect();
        let message = format!("table {:?} has no column {:?}; there are: {}", table.name, fold(name), known.join(", "));
        SqlError::invalid("unknown_column", message).at_span(self.text, name.span)
    }

    fn at_name(&self, error: SqlError, name: &ObjectName) -> SqlError {
        match name.0.first().and_then(|part| part.as_ident()) {
            Some(ident) => error.at_span(self.text, ident.span),
            None => error,
        }
    }
}

fn already(table: &Table, column: &str) -> SqlError {
    SqlError::invalid("duplicate_column", format!("table {:?} has a column {column:?} already", table.name))
}
