//! Which groups a change can concern: an index in front of their predicates.
//!
//! Per table and row scope: groups that any row may concern, groups that are run again as a whole, and for every column
//! that predicates speak of a hash of single values and a tree of ranges. A change asks with the values of its old and
//! its new row, so at an equal number of answers 100,000 groups cost it what 100 do. The answer may name groups that do
//! not match; their predicates run afterwards. It never leaves one out: every value is compared here as the predicate
//! compares it, and what has no place in that order (NaN) asks for every group on its column.

mod intervals;
mod order;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};

use wire::{ImageRef, Kind, Scope};

use super::GroupSpec;
use super::evaluate::Rows;
use crate::catalog::{Anchor, Anchors, Holds, NamespaceId, Table, TableId};
use intervals::Intervals;
use order::{Cell, cell, sortable, sorted};

/// All groups of one worker.
#[derive(Default)]
pub(super) struct Index {
    by_table: HashMap<TableId, HashMap<Scope, Groups>>,
    namespaces: HashMap<NamespaceId, usize>,
}

/// Groups that a commit can concern.
#[derive(Default)]
pub(super) struct Candidates {
    /// With all changes.
    pub any: Vec<u64>,
    /// With some of them: groups and the numbers of their changes, in order.
    pub some: Vec<(u64, usize)>,
    /// To be run again.
    pub requery: Vec<u64>,
}

impl Index {
    pub(super) fn insert(&mut self, id: u64, spec: &GroupSpec) {
        for (table, scope) in spec.sources() {
            let groups = self.by_table.entry(table.id).or_default().entry(scope.clone()).or_default();
            groups.insert(id, spec, table);
            *self.namespaces.entry(table.namespace).or_default() += 1;
        }
    }

    pub(super) fn remove(&mut self, id: u64, spec: &GroupSpec) {
        for (table, scope) in spec.sources() {
            if let Some(scopes) = self.by_table.get_mut(&table.id) {
                if let Some(groups) = scopes.get_mut(scope) {
                    groups.remove(id, spec);
                    if groups.is_empty() {
                        scopes.remove(scope);
                    }
                }
                if scopes.is_empty() {
                    self.by_table.remove(&table.id);
                }
            }
            if let Some(count) = self.namespaces.get_mut(&table.namespace) {
                *count -= 1;
                if *count == 0 {
                    self.namespaces.remove(&table.namespace);
                }
            }
        }
    }

    pub(super) fn has_namespace(&self, namespace: NamespaceId) -> bool {
        self.namespaces.contains_key(&namespace)
    }

    pub(super) fn namespaces(&self) -> impl Iterator<Item = NamespaceId> {
        self.namespaces.keys().copied()
    }

    pub(super) fn concerns(&self, table: TableId, scope: &Scope) -> bool {
        self.by_table.get(&table).is_some_and(|scopes| scopes.contains_key(scope))
    }

    pub(super) fn candidates(&self, table: TableId, scope: &Scope, rows: &Rows<'_>) -> Candidates {
        let groups = self.by_table.get(&table).and_then(|scopes| scopes.get(scope));
        groups.map_or_else(Candidates::default, |groups| groups.candidates(rows))
    }

    /// All groups that read the table, in any scope.
    pub(super) fn on_table(&self, table: TableId) -> Vec<u64> {
        let groups = self.by_table.get(&table).into_iter().flat_map(HashMap::values);
        groups.flat_map(|groups| groups.all.iter().copied()).collect()
    }
}

/// The groups on one table and scope.
#[derive(Default)]
struct Groups {
    all: BTreeSet<u64>,
    any: BTreeSet<u64>,
    requery: BTreeSet<u64>,
    columns: HashMap<u16, Conditions>,
}

/// What groups ask of one column.
struct Conditions {
    kind: Kind,
    null: Ids,
    values: HashMap<Box<[u8]>, Ids>,
    ranges: Intervals,
}

impl Groups {
    fn insert(&mut self, id: u64, spec: &GroupSpec, table: &Table) {
        self.all.insert(id);
        match &spec.anchors {
            _ if spec.requery.is_some() => {
                self.requery.insert(id);
            }
            Anchors::Any => {
                self.any.insert(id);
            }
            Anchors::OneOf(anchors) => {
                for anchor in anchors {
                    // A column that is gone is NULL in every row to come; the kind does not matter then.
                    let kind = table.column_by_id(anchor.column).map_or(Kind::Int, |column| column.ty.kind());
                    self.columns.entry(anchor.column).or_insert_with(|| Conditions::new(kind)).insert(id, anchor);
                }
            }
        }
    }

    fn remove(&mut self, id: u64, spec: &GroupSpec) {
        self.all.remove(&id);
        self.any.remove(&id);
        self.requery.remove(&id);
        let Anchors::OneOf(anchors) = &spec.anchors else { return };
        for anchor in anchors {
            if let Some(conditions) = self.columns.get_mut(&anchor.column) {
                conditions.remove(id, anchor);
                if conditions.is_empty() {
                    self.columns.remove(&anchor.column);
                }
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    fn candidates(&self, rows: &Rows<'_>) -> Candidates {
        let mut found = Candidates {
            any: self.any.iter().copied().collect(),
            some: Vec::new(),
            requery: self.requery.iter().copied().collect(),
        };
        let (mut ids, mut before, mut after) = (Vec::new(), Vec::new(), Vec::new());
        for (change, (old, new)) in rows.pairs().enumerate() {
            for (&column, conditions) in &self.columns {
                let old = old.map(|row| cell(&row, column, conditions.kind, &mut before));
                let new = new.map(|row| cell(&row, column, conditions.kind, &mut after));
                if let Some(old) = old {
                    conditions.fitting(old, &mut ids);
                }
                if let Some(new) = new.filter(|new| Some(*new) != old) {
                    conditions.fitting(new, &mut ids);
                }
            }
            found.some.extend(ids.drain(..).map(|id| (id, change)));
        }
        found.some.sort_unstable();
        // By its old and its new row, and by several conditions of one group.
        found.some.dedup();
        found
    }
}

impl Conditions {
    fn new(kind: Kind) -> Self {
        Conditions { kind, null: Ids::default(), values: HashMap::new(), ranges: Intervals::default() }
    }

    fn insert(&mut self, id: u64, anchor: &Anchor) {
        match place(&anchor.holds) {
            Place::Null => self.null.insert(id),
            Place::Value(value) => self.values.entry(value).or_default().insert(id),
            Place::Range(low, high) => self.ranges.insert(low, high, id),
        }
    }

    fn remove(&mut self, id: u64, anchor: &Anchor) {
        match place(&anchor.holds) {
            Place::Null => self.null.remove(id),
            Place::Value(value) => {
                if let Some(ids) = self.values.get_mut(&value) {
                    ids.remove(id);
                    if ids.is_empty() {
                        self.values.remove(&value);
                    }
                }
            }
            Place::Range(low, high) => self.ranges.remove(&low, high.as_deref(), id),
        }
    }

    fn is_empty(&self) -> bool {
        self.null.is_empty() && self.values.is_empty() && self.ranges.is_empty()
    }

    fn fitting(&self, cell: Cell<'_>, found: &mut Vec<u64>) {
        match cell {
            Cell::Null => found.extend(self.null.iter()),
            Cell::Value(value) => {
                found.extend(self.values.get(value).into_iter().flat_map(Ids::iter));
                self.ranges.around(value, found);
            }
            Cell::Odd => {
                found.extend(self.values.values().flat_map(Ids::iter));
                self.ranges.all(found);
            }
        }
    }
}

enum Place {
    Null,
    Value(Box<[u8]>),
    Range(Box<[u8]>, Option<Box<[u8]>>),
}

fn place(holds: &Holds) -> Place {
    match holds {
        Holds::Value(value) => sorted(value).map_or(Place::Null, Place::Value),
        Holds::Range { least, most } => {
            let low = least.as_ref().and_then(sorted).unwrap_or_default();
            Place::Range(low, most.as_ref().and_then(sorted))
        }
        Holds::Prefix(start) => Place::Range(start.as_bytes().into(), order::last_with_prefix(start)),
    }
}

/// Whether a row fits: the same question as the index answers, for one group.
pub fn admits(anchors: &Anchors, table: &Table, row: &ImageRef<'_>) -> bool {
    let Anchors::OneOf(anchors) = anchors else { return true };
    let (mut of_row, mut of_anchor) = (Vec::new(), Vec::new());
    anchors.iter().any(|anchor| {
        let kind = table.column_by_id(anchor.column).map_or(Kind::Int, |column| column.ty.kind());
        fits(cell(row, anchor.column, kind, &mut of_row), &anchor.holds, &mut of_anchor)
    })
}

/// As [`place`] and [`Conditions::fitting`] have it, without a copy of the constants: this is asked of every row that
/// comes to a group, for each value of an IN list.
fn fits(cell: Cell<'_>, holds: &Holds, scratch: &mut Vec<u8>) -> bool {
    let value = match (cell, holds) {
        (Cell::Null, Holds::Value(wanted)) => return sortable(wanted, scratch).is_none(),
        (Cell::Null, _) => return false,
        (Cell::Odd, Holds::Value(wanted)) => return sortable(wanted, scratch).is_some(),
        (Cell::Odd, _) => return true,
        (Cell::Value(value), _) => value,
    };
    match holds {
        Holds::Value(wanted) => sortable(wanted, scratch) == Some(value),
        Holds::Range { least, most } => {
            let low = least.as_ref().and_then(|least| sortable(least, scratch));
            if low.is_some_and(|low| value < low) {
                return false;
            }
            let high = most.as_ref().and_then(|most| sortable(most, scratch));
            high.is_none_or(|high| value <= high)
        }
        Holds::Prefix(start) => value.starts_with(start.as_bytes()),
    }
}

/// Group ids: mostly one, sometimes very many, and then leaving must not look through them all.
#[derive(Default)]
enum Ids {
    #[default]
    None,
    One(u64),
    Many(BTreeSet<u64>),
}

impl Ids {
    fn insert(&mut self, id: u64) {
        match self {
            Ids::None => *self = Ids::One(id),
            Ids::One(one) if *one == id => {}
            Ids::One(one) => *self = Ids::Many(BTreeSet::from([*one, id])),
            Ids::Many(many) => {
                many.insert(id);
            }
        }
    }

    fn remove(&mut self, id: u64) {
        match self {
            Ids::One(one) if *one == id => *self = Ids::None,
            Ids::Many(many) => {
                many.remove(&id);
                if let (1, Some(&last)) = (many.len(), many.first()) {
                    *self = Ids::One(last);
                }
            }
            _ => {}
        }
    }

    fn is_empty(&self) -> bool {
        matches!(self, Ids::None)
    }

    fn iter(&self) -> impl Iterator<Item = u64> {
        let (one, many) = match self {
            Ids::None => (None, None),
            Ids::One(one) => (Some(*one), None),
            Ids::Many(many) => (None, Some(many.iter().copied())),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }
}
