//! ON CONFLICT: which stored row is in the way of a proposed one, and what is done about it.
//!
//! What is in the way is judged as the transaction sees it at its snapshot. Two requests that insert the same new key
//! at once write that key both, so the committer lets one of them win; the other plans again and finds the row.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::Arc;

use ::arrow::array::{Array, AsArray};
use datafusion::sql::sqlparser::ast::{
    ConflictTarget, DoUpdate, Expr, Ident, OnConflictAction, OnInsert, TableObject, visit_expressions_mut,
};
use wire::{ImageBuilder, ImageRef, Type, Value};

use super::changes::{Changes, cast_columns, parse_image};
use super::unique::claimed;
use super::{assignments, numbered, table_named};
use crate::catalog::{Column, Index, IndexId, Table};
use crate::sql::ddl::fold;
use crate::sql::row_exprs::{Asked, RowExprs};
use crate::sql::session::Engine;
use crate::sql::{RequestEnv, SqlError};
use crate::store::StoreError;
use crate::store::keys::encode_key;

/// What the proposed row is called in DO UPDATE.
const PROPOSED: &str = "excluded";

#[derive(Clone)]
pub(super) struct OnConflict {
    arbiter: Arbiter,
    resolution: Resolution,
}

/// What is done about a conflict.
#[derive(Clone)]
enum Resolution {
    /// DO NOTHING.
    Nothing,
    /// DO UPDATE.
    Update(Box<Update>),
    /// The stored row takes these columns from the proposed one. Rows come in pieces of any size here, so one that comes
    /// twice is no mistake, wherever it is cut: the last one counts.
    Take(Vec<u16>),
}

/// What is a conflict; anything else that is there twice is an error.
#[derive(Clone, Copy, PartialEq)]
enum Arbiter {
    Any,
    Key,
    Index(IndexId),
}

#[derive(Clone)]
struct Update {
    /// What is set, in the order of `set`.
    columns: Vec<Column>,
    set: RowExprs,
    condition: Option<RowExprs>,
    /// It may set what rows conflict by: then the next row is to find it set.
    at_once: bool,
}

/// Stored rows that proposed ones ran into; evaluated many at a time.
#[derive(Default)]
pub(super) struct Rivals {
    rows: Vec<Rival>,
    keys: HashSet<Vec<u8>>,
}

struct Rival {
    key: Vec<u8>,
    stored: Vec<u8>,
    proposed: Vec<u8>,
}

impl OnConflict {
    pub(super) fn compile(
        engine: &Engine,
        env: &RequestEnv,
        text: &str,
        on: &OnInsert,
        table: &Table,
        named: &TableObject,
    ) -> Result<OnConflict, SqlError> {
        let OnInsert::OnConflict(on) = on else {
            let hint = Some("say ON CONFLICT (key) DO UPDATE SET …");
            return Err(SqlError::unsupported("ON DUPLICATE KEY UPDATE", hint));
        };
        let arbiter = match &on.conflict_target {
            None => Arbiter::Any,
            Some(ConflictTarget::Columns(columns)) => arbiter(columns, table, text)?,
            Some(ConflictTarget::OnConstraint(_)) => {
                return Err(SqlError::unsupported("ON CONFLICT ON CONSTRAINT", Some("name the columns")));
            }
        };
        let resolution = match &on.action {
            OnConflictAction::DoNothing => Resolution::Nothing,
            OnConflictAction::DoUpdate(_) if arbiter == Arbiter::Any => {
                let key = names(table, &table.key).join(", ");
                let message = format!("say which key: ON CONFLICT ({key}) DO UPDATE …");
                return Err(SqlError::invalid("conflict_target", message));
            }
            OnConflictAction::DoUpdate(update) => {
                Resolution::Update(Box::new(Update::compile(engine, env, text, update, table, named)?))
            }
        };
        Ok(OnConflict { arbiter, resolution })
    }

    /// DO NOTHING, whatever is in the way.
    pub(super) fn nothing() -> OnConflict {
        OnConflict { arbiter: Arbiter::Any, resolution: Resolution::Nothing }
    }

    /// A row whose key is there already has these columns set.
    pub(super) fn take(columns: &[Column]) -> OnConflict {
        let given = columns.iter().map(|column| column.id).collect();
        OnConflict { arbiter: Arbiter::Key, resolution: Resolution::Take(given) }
    }
}

impl Update {
    fn compile(
        engine: &Engine,
        env: &RequestEnv,
        text: &str,
        update: &DoUpdate,
        table: &Table,
        named: &TableObject,
    ) -> Result<Update, SqlError> {
        if table.name == PROPOSED {
            return Err(SqlError::unsupported(format!("DO UPDATE on a table that is called {PROPOSED}"), None));
        }
        let from = vec![table_named(named, None)?, table_named(named, Some(PROPOSED))?];
        let compile = |exprs: Vec<Expr>| {
            let exprs = exprs.into_iter().map(|expr| of_stored_row(expr, table));
            let items = numbered(exprs);
            let asked = Asked { clause: "DO UPDATE", items, table, from: from.clone(), others: &[PROPOSED] };
            RowExprs::compile(engine, env, text, asked)
        };
        let (columns, values) = assignments(&update.assignments, table, text)?;
        let set = compile(values)?;
        let condition = update.selection.clone().map(|selection| compile(vec![selection])).transpose()?;
        if let Some(found) = condition.as_ref().map(|condition| condition.columns[0].ty)
            && found != Type::Boolean
        {
            let message = format!("WHERE in DO UPDATE is {found}, not BOOLEAN");
            return Err(SqlError::invalid("type_mismatch", message));
        }
        let unique = table.indexes.iter().filter(|index| index.unique).flat_map(|index| &index.columns);
        let arbiters: HashSet<u16> = unique.chain(&table.key).copied().collect();
        let at_once = columns.iter().any(|column| arbiters.contains(&column.id));
        Ok(Update { columns, set, condition, at_once })
    }
}

/// The primary key or unique index over exactly these columns, in any order.
fn arbiter(columns: &[Ident], table: &Table, text: &str) -> Result<Arbiter, SqlError> {
    let mut ids = Vec::with_capacity(columns.len());
    for ident in columns {
        let name = fold(ident);
        let column = table.column(&name).ok_or_else(|| {
            let message = format!("table {:?} has no column {name:?}", table.name);
            SqlError::invalid("unknown_column", message).at_span(text, ident.span)
        })?;
        ids.push(column.id);
    }
    ids.sort_unstable();
    let is_meant = |columns: &[u16]| {
        let mut columns = columns.to_vec();
        columns.sort_unstable();
        columns == ids
    };
    if is_meant(&table.key) {
        return Ok(Arbiter::Key);
    }
    let unique = || table.indexes.iter().filter(|index| index.is_enforced());
    if let Some(index) = unique().find(|index| is_meant(&index.columns)) {
        return Ok(Arbiter::Index(index.id));
    }
    let known: Vec<String> = [&table.key]
        .into_iter()
        .chain(unique().map(|index| &index.columns))
        .map(|columns| format!("({})", names(table, columns).join(", ")))
        .collect();
    let message =
        format!("no key of {:?} has exactly these columns; unique there are {}", table.name, known.join(", "));
    let error = SqlError::invalid("conflict_target", message);
    match columns.first() {
        Some(first) => Err(error.at_span(text, first.span)),
        None => Err(error),
    }
}

fn names<'a>(table: &'a Table, columns: &[u16]) -> Vec<&'a str> {
    columns.iter().filter_map(|id| table.column_by_id(*id)).map(|column| column.name.as_str()).collect()
}

/// A bare column name means the stored row's: the proposed one's is said with `excluded.`.
fn of_stored_row(mut expr: Expr, table: &Table) -> Expr {
    let stored = Ident::with_quote('"', &table.name);
    let _: ControlFlow<()> = visit_expressions_mut(&mut expr, |expr| {
        if let Expr::Identifier(ident) = expr
            && table.column(&fold(ident)).is_some()
        {
            *expr = Expr::CompoundIdentifier(vec![stored.clone(), ident.clone()]);
        }
        ControlFlow::Continue(())
    });
    expr
}

impl Changes<'_> {
    /// A proposed row: written where nothing is in its way, else left out or kept for [`Changes::resolve`].
    pub(super) fn put_or_resolve(
        &mut self,
        on_conflict: &OnConflict,
        key: &[Value],
        proposed: Vec<u8>,
        rivals: &mut Rivals,
    ) -> Result<(), SqlError> {
        let Some(rival) = self.rival(on_conflict.arbiter, key, &proposed)? else {
            self.claim(&proposed, &encode_key(&self.table, key))?;
            self.put_new(key, proposed)?;
            self.affected += 1;
            return Ok(());
        };
        let update = match &on_conflict.resolution {
            Resolution::Nothing => return Ok(()),
            Resolution::Take(given) => return self.take(rival, given, &proposed),
            Resolution::Update(update) => update,
        };
        if rivals.keys.contains(&rival) {
            self.resolve(on_conflict, rivals)?;
        }
        if self.by_key.contains_key(&rival) {
            let message = "DO UPDATE meets the same row twice in one statement: give each key once";
            return Err(SqlError::constraint("conflict_twice", message));
        }
        let stored = self.lookup(&rival)?.ok_or_else(|| self.rival_is_gone())?;
        let bytes = 2 * rival.len() + stored.len() + proposed.len() + size_of::<Rival>();
        self.held.grow(bytes)?;
        rivals.keys.insert(rival.clone());
        rivals.rows.push(Rival { key: rival, stored, proposed });
        if update.at_once { self.resolve(on_conflict, rivals) } else { Ok(()) }
    }

    /// Sets columns of the row under this key, as the statement has left it so far, to what the proposed row says. They are
    /// none of its key, or have the same value there: the row stays where it is.
    fn take(&mut self, key: Vec<u8>, given: &[u16], proposed: &[u8]) -> Result<(), SqlError> {
        let written = self.by_key.get(&key).copied();
        let stored = match written {
            Some(at) => self.writes[at].new.clone(),
            None => self.lookup(&key)?,
        };
        let stored = stored.ok_or_else(|| self.rival_is_gone())?;
        let (old, said) = (parse_image(&stored)?, parse_image(proposed)?);
        let mut image = ImageBuilder::new(self.table.slots());
        for column in &self.table.columns {
            let from = if given.contains(&column.id) { &said } else { &old };
            let value = from.value(column.id, column.ty).map_err(|error| StoreError::Corrupt(error.to_string()))?;
            image.set(column.id, &value);
        }
        let image = image.finish();
        self.affected += 1;
        match written {
            Some(at) => {
                self.held.grow(image.len())?;
                self.writes[at].new = Some(image);
                Ok(())
            }
            None => self.put(key, Some(stored), Some(image)),
        }
    }

    fn rival_is_gone(&self) -> SqlError {
        SqlError::Internal(format!("a row of table {:?} conflicts but cannot be found", self.table.name))
    }

    /// The key of the row that a proposed one runs into, as the statement has left it so far.
    fn rival(&self, arbiter: Arbiter, key: &[Value], proposed: &[u8]) -> Result<Option<Vec<u8>>, SqlError> {
        if matches!(arbiter, Arbiter::Any | Arbiter::Key) {
            let encoded = encode_key(&self.table, key);
            if self.present(&encoded)? {
                return Ok(Some(encoded));
            }
        }
        let asked = |index: &&Arc<Index>| match arbiter {
            Arbiter::Any => true,
            Arbiter::Key => false,
            Arbiter::Index(id) => index.id == id,
        };
        for index in self.uniques.indexes.iter().filter(asked) {
            let Some(values) = claimed(&self.table, index, proposed)? else { continue };
            let written = self.claims.get(&(index.id, values.clone())).cloned();
            if let Some(rival) = written.map_or_else(|| self.holder(index, values), |key| Ok(Some(key)))? {
                return Ok(Some(rival));
            }
        }
        Ok(None)
    }

    /// Remembers what a row written by this statement has in unique indexes, for the rows that follow.
    fn claim(&mut self, image: &[u8], key: &[u8]) -> Result<(), SqlError> {
        for index in &self.uniques.indexes {
            if let Some(values) = claimed(&self.table, index, image)? {
                let bytes = values.len() + key.len() + size_of::<(IndexId, Vec<u8>, Vec<u8>)>();
                self.held.grow(bytes)?;
                self.claims.insert((index.id, values), key.to_vec());
            }
        }
        Ok(())
    }

    /// DO UPDATE of the rows gathered so far.
    pub(super) fn resolve(&mut self, on_conflict: &OnConflict, rivals: &mut Rivals) -> Result<(), SqlError> {
        let Resolution::Update(update) = &on_conflict.resolution else { return Ok(()) };
        let mut rows = std::mem::take(rivals).rows;
        if let Some(condition) = &update.condition {
            let verdicts = condition.evaluate(&pairs(&rows)?.each_ref().map(Vec::as_slice))?;
            let verdicts = verdicts[0]
                .as_boolean_opt()
                .ok_or_else(|| SqlError::Internal("the condition of DO UPDATE is no BOOLEAN".to_owned()))?;
            let mut met = (0..rows.len()).map(|row| verdicts.is_valid(row) && verdicts.value(row));
            // In order, one verdict a row. Only what is updated is evaluated below: the rest may not even fit.
            rows.retain(|_| met.next() == Some(true));
        }
        if rows.is_empty() {
            return Ok(());
        }
        let values = update.set.evaluate(&pairs(&rows)?.each_ref().map(Vec::as_slice))?;
        let values = cast_columns(&values, &update.columns)?;
        for (row, rival) in rows.into_iter().enumerate() {
            let key = rival.key.clone();
            self.replace(rival.key, rival.stored, &update.columns, &values, row)?;
            // (A row whose key changes has moved away; it is put back, and judged, at the end.)
            if let Some(new) = self.by_key.get(&key).and_then(|at| self.writes[*at].new.clone()) {
                self.claim(&new, &key)?;
            }
        }
        Ok(())
    }

    /// Whether there is a row under this key as the statement has left it so far.
    fn present(&self, key: &[u8]) -> Result<bool, SqlError> {
        match self.by_key.get(key) {
            Some(at) => Ok(self.writes[*at].new.is_some()),
            None => Ok(self.lookup(key)?.is_some()),
        }
    }
}

/// The stored rows, and the proposed ones.
fn pairs(rows: &[Rival]) -> Result<[Vec<ImageRef<'_>>; 2], SqlError> {
    let images = |of: fn(&Rival) -> &[u8]| rows.iter().map(|rival| parse_image(of(rival))).collect::<Result<_, _>>();
    Ok([images(|rival| &rival.stored)?, images(|rival| &rival.proposed)?])
}
