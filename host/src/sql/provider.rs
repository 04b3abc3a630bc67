//! Table providers: scans with projection, key or index ranges and LIMIT pushed down; rows stream from the store, the first
//! ones in place, the others from a blocking thread.
//!
//! A provider belongs to a table version and its indexes, not to a user. Who asks, at which snapshot, travels in the task context
//! ([`RequestEnv`]) and decides the key range when the scan starts: rows of other users are never read.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::ops::Bound;
use std::sync::{Arc, Mutex, PoisonError};

use ::arrow::datatypes::SchemaRef;
use ::arrow::record_batch::RecordBatch;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::Result;
use datafusion::datasource::provider_as_source;
use datafusion::execution::SendableRecordBatchStream;
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown, TableSource, TableType};
use datafusion::physical_expr::expressions::Column as PhysicalColumn;
use datafusion::physical_expr::{EquivalenceProperties, PhysicalExpr, PhysicalSortExpr};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::stream::{RecordBatchReceiverStreamBuilder, RecordBatchStreamAdapter};
use futures::future::BoxFuture;
use futures::{Stream, StreamExt};
use tokio::sync::mpsc::Sender;
use wire::{ColumnDecl, ImageRef, Scope};

use super::arrow::{RowBatchBuilder, arrow_schema};
use super::leaf::{Leaf, Reader, RowsAsked};
use super::range::{KeyRanges, best_ranges, is_useful};
use super::system::SystemTables;
use super::{RequestEnv, SqlError};
use crate::catalog::{Index, Table, TableId, TableKind};
use crate::store::StoreError;
use crate::store::keys::{KeyRange, successor};

/// Batches that may wait for their reader.
const WAITING_BATCHES: usize = 2;
/// A batch of wide rows ends before its number of rows is reached: batches on their way are not in the memory pool, and
/// thousands of rows can be of a megabyte each.
const BATCH_BYTES: usize = 2 << 20;
/// Rows that a scan reads at once; each further batch has four times as many, up to the whole. Whoever wants a few rows, or
/// the first ones soon, does not wait for thousands. With 64 such queries begin sooner, but a sort that spills out of a
/// small pool then failed now and then: one batch more on the way costs it more than it has left.
const FIRST_ROWS: usize = 128;
/// A LIMIT above is taken for twice as many rows, some of which a filter drops; and for no fewer than these.
const FEWEST_ROWS: usize = 16;
/// Key ranges that rows of such a batch are looked for in at most: each begins with a search.
const FIRST_RANGES: usize = 16;
/// Table versions whose providers are kept. Beyond that all are made anew: they are cheap.
const CACHED_TABLES: usize = 1_024;

/// Providers by table version, so that an Arrow schema is made once; and those of the system tables.
pub(crate) struct Providers {
    sources: Mutex<HashMap<(TableId, u32), Source>>,
    pub(crate) system: SystemTables,
}

/// Made for exactly this table: another set of indexes is no other version.
struct Source {
    table: Arc<Table>,
    source: Arc<dyn TableSource>,
}

impl Source {
    fn new(table: &Arc<Table>) -> Source {
        Source { table: table.clone(), source: provider_as_source(Arc::new(Rows::new(table.clone()))) }
    }
}

impl Providers {
    pub(crate) fn new(system: SystemTables) -> Providers {
        Providers { sources: Mutex::default(), system }
    }

    pub(crate) fn source(&self, table: &Arc<Table>) -> Arc<dyn TableSource> {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if sources.len() >= CACHED_TABLES {
            sources.clear();
        }
        let known = sources.entry((table.id, table.schema_version)).or_insert_with(|| Source::new(table));
        if !Arc::ptr_eq(&known.table, table) && known.table.indexes != table.indexes {
            *known = Source::new(table);
        }
        known.source.clone()
    }
}

/// The scope a user sees of a table.
pub(crate) fn scope_of(table: &Table, user: &str) -> Scope {
    match table.kind {
        TableKind::Shared | TableKind::Stream => Scope::Shared,
        TableKind::User => Scope::User(user.to_owned()),
    }
}

#[derive(Debug)]
pub(crate) struct Rows {
    table: Arc<Table>,
    columns: Vec<ColumnDecl>,
    schema: SchemaRef,
}

impl Rows {
    fn new(table: Arc<Table>) -> Rows {
        let schema = table.schema();
        Rows { schema: arrow_schema(&schema), columns: schema.columns, table }
    }

    /// Whether rows go by themselves, also under whoever reads them for long.
    pub(crate) fn expires(&self) -> bool {
        self.table.kind == TableKind::Stream
    }

    fn plan(
        &self,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let (columns, schema) = match projection {
            None => (self.columns.clone(), self.schema.clone()),
            Some(picked) => {
                let columns = picked.iter().map(|at| self.columns[*at].clone()).collect();
                (columns, Arc::new(self.schema.project(picked)?))
            }
        };
        let ranges = best_ranges(&self.table, filters);
        let equivalences = equivalences(&self.table, &columns, &schema, ranges.index.is_none());
        // Rows that a filter above drops would count against a limit here.
        let limit = limit.filter(|_| filters.is_empty());
        Ok(Leaf::plan(TableReader { table: self.table.clone(), columns, ranges, limit }, equivalences))
    }
}

impl TableProvider for Rows {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    fn scan<'a, 'b, 'c, 'd, 'r>(
        &'a self,
        _state: &'b dyn Session,
        projection: Option<&'c Vec<usize>>,
        filters: &'d [Expr],
        limit: Option<usize>,
    ) -> BoxFuture<'r, Result<Arc<dyn ExecutionPlan>>>
    where
        'a: 'r,
        'b: 'r,
        'c: 'r,
        'd: 'r,
        Self: 'r,
    {
        Box::pin(std::future::ready(self.plan(projection, filters, limit)))
    }

    fn supports_filters_pushdown(&self, filters: &[&Expr]) -> Result<Vec<TableProviderFilterPushDown>> {
        let judge = |filter: &&Expr| match is_useful(&self.table, filter) {
            true => TableProviderFilterPushDown::Inexact,
            false => TableProviderFilterPushDown::Unsupported,
        };
        Ok(filters.iter().map(judge).collect())
    }
}

/// Rows are in key order, unless they are found through an index.
fn equivalences(
    table: &Table,
    columns: &[ColumnDecl],
    schema: &SchemaRef,
    in_key_order: bool,
) -> EquivalenceProperties {
    let mut order = Vec::new();
    for id in table.key.iter().filter(|_| in_key_order) {
        // The order holds for leading key columns, as far as they are read.
        let Some(at) = columns.iter().position(|column| column.id == *id) else { break };
        let column: Arc<dyn PhysicalExpr> = Arc::new(PhysicalColumn::new(&columns[at].name, at));
        order.push(PhysicalSortExpr::new_default(column));
    }
    if order.is_empty() {
        EquivalenceProperties::new(schema.clone())
    } else {
        EquivalenceProperties::new_with_orderings(schema.clone(), [order])
    }
}

/// Reads the key ranges of one table.
#[derive(Debug)]
struct TableReader {
    table: Arc<Table>,
    columns: Vec<ColumnDecl>,
    ranges: KeyRanges,
    limit: Option<usize>,
}

impl Reader for TableReader {
    const NAME: &'static str = "TableScan";

    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns: Vec<&str> = self.columns.iter().map(|column| column.name.as_str()).collect();
        let Table { namespace_name, name, .. } = &*self.table;
        write!(f, "TableScan: {namespace_name}.{name}")?;
        if let Some(index) = &self.ranges.index {
            write!(f, ", index={}", index.name)?;
        }
        write!(f, ", keys=[{}], columns=[{}]", self.ranges.shown, columns.join(", "))?;
        match self.limit {
            Some(limit) => write!(f, ", limit={limit}"),
            None => Ok(()),
        }
    }

    fn read(&self, env: Arc<RequestEnv>, schema: &SchemaRef, rows: RowsAsked) -> Result<SendableRecordBatchStream> {
        let at_once = FIRST_ROWS.min(rows.batch);
        let first = rows.wanted.map_or(at_once, |wanted| wanted.saturating_mul(2).max(FEWEST_ROWS).min(at_once));
        let scan = Scan {
            scope: scope_of(&self.table, &env.user),
            table: self.table.clone(),
            columns: self.columns.clone(),
            schema: schema.clone(),
            index: self.ranges.index.clone(),
            ranges: self.ranges.ranges.clone(),
            left: self.limit.unwrap_or(usize::MAX),
            at_once,
            next_rows: first,
            batch_rows: rows.batch,
            env,
        };
        Ok(Box::pin(RecordBatchStreamAdapter::new(schema.clone(), scan.batches())))
    }
}

/// A running scan.
struct Scan {
    env: Arc<RequestEnv>,
    table: Arc<Table>,
    scope: Scope,
    columns: Vec<ColumnDecl>,
    schema: SchemaRef,
    /// What the ranges are of, if not of the primary key.
    index: Option<Arc<Index>>,
    ranges: Vec<KeyRange>,
    left: usize,
    /// Rows that may be read where they are asked for.
    at_once: usize,
    /// Rows of the next batch.
    next_rows: usize,
    batch_rows: usize,
}

type Batches = Sender<Result<RecordBatch>>;

/// How far the reading is.
enum Reading {
    AtOnce(Scan),
    /// What could be had at once was.
    Begun(Scan),
    /// A thread reads the rest.
    Running(SendableRecordBatchStream),
}

/// Whether anybody still wants rows.
enum Wanted {
    More,
    Enough,
}

impl Scan {
    /// The first rows are read where they are asked for, as by a lookup by key: many queries want no more, and a thread
    /// that is woken, reads ahead and is stopped costs them more than their rows. The rest is read on a blocking thread,
    /// and not before somebody asks for it.
    fn batches(self) -> impl Stream<Item = Result<RecordBatch>> + Send {
        futures::stream::unfold(Some(Reading::AtOnce(self)), |reading| async move {
            let mut reading = reading?;
            loop {
                reading = match reading {
                    Reading::AtOnce(scan) if scan.at_once == 0 => Reading::Begun(scan),
                    Reading::AtOnce(scan) => match scan.portion() {
                        Ok((Some(batch), rest)) => return Some((Ok(batch), rest.map(Reading::AtOnce))),
                        Ok((None, rest)) => Reading::Begun(rest?),
                        Err(error) => return Some((Err(error.into_datafusion()), None)),
                    },
                    Reading::Begun(scan) => Reading::Running(scan.on_a_thread()),
                    Reading::Running(mut batches) => {
                        let batch = batches.next().await?;
                        return Some((batch, Some(Reading::Running(batches))));
                    }
                };
            }
        })
    }

    /// A batch, and what is left to read after it. Where rows cannot be had soon nothing is read here: by an index, in
    /// stream tables, whose expired rows are passed over, and where uncommitted rows are to be merged in.
    fn portion(mut self) -> std::result::Result<(Option<RecordBatch>, Option<Scan>), SqlError> {
        let uncommitted = self.env.overlay.rows.contains_key(&(self.table.id, self.scope.clone()));
        if self.index.is_some() || uncommitted || self.table.kind == TableKind::Stream {
            return Ok((None, Some(self)));
        }
        let rows = self.next_rows.min(self.at_once).min(self.left);
        let mut builder = RowBatchBuilder::with_schema(self.schema.clone(), &self.columns, rows);
        let mut ranges = VecDeque::from(std::mem::take(&mut self.ranges));
        let mut searches = 0;
        while searches < FIRST_RANGES
            && let Some(range) = ranges.pop_front()
        {
            searches += 1;
            if let Some(rest) = self.portion_of(range, rows, &mut builder)? {
                ranges.push_front(rest);
                break;
            }
        }
        self.left -= builder.rows();
        // Fewer than asked for: rows are wide here, or lie far apart.
        self.at_once = if builder.rows() == rows { self.at_once - rows } else { 0 };
        let batch = if builder.rows() > 0 { Some(builder.finish()?) } else { None };
        if self.left == 0 || ranges.is_empty() {
            return Ok((batch, None));
        }
        if batch.is_some() {
            self.next_rows = (self.next_rows * 4).min(self.batch_rows);
        }
        self.ranges = ranges.into();
        Ok((batch, Some(self)))
    }

    /// Reads stored rows until the batch has so many; the part of the range behind them, unless the range has ended.
    fn portion_of(
        &self,
        range: KeyRange,
        rows: usize,
        builder: &mut RowBatchBuilder,
    ) -> std::result::Result<Option<KeyRange>, SqlError> {
        let mut stored = self.env.snapshot.scan_briefly(&self.table, &self.scope, &range);
        let mut last: Option<Vec<u8>> = None;
        while builder.rows() < rows && builder.bytes() < BATCH_BYTES {
            match stored.next_row() {
                Ok(None) => return Ok(None),
                Ok(Some((key, image))) => {
                    let (image, ..) = ImageRef::parse(image).map_err(|error| StoreError::Corrupt(error.to_string()))?;
                    builder.push(&image)?;
                    let last = last.get_or_insert_default();
                    last.clear();
                    last.extend_from_slice(key);
                }
                // Too much that was deleted lies here; or what is wrong will be so for the thread, which says it.
                Err(_) => break,
            }
        }
        let start = last.map_or(range.start, Bound::Excluded);
        Ok(Some(KeyRange { start, end: range.end }))
    }

    fn on_a_thread(self) -> SendableRecordBatchStream {
        let mut stream = RecordBatchReceiverStreamBuilder::new(self.schema.clone(), WAITING_BATCHES);
        let batches = stream.tx();
        stream.spawn_blocking(move || self.run(&batches).map_err(SqlError::into_datafusion));
        stream.build()
    }

    fn run(mut self, batches: &Batches) -> std::result::Result<(), SqlError> {
        let capacity = self.next_rows.min(self.left);
        let mut builder = RowBatchBuilder::with_schema(self.schema.clone(), &self.columns, capacity);
        let ranges = std::mem::take(&mut self.ranges);
        if let Some(index) = self.index.clone() {
            self.by_index(&index, &ranges, &mut builder, batches)?;
        } else {
            for range in ranges {
                if let Wanted::Enough = self.range(range, &mut builder, batches)? {
                    break;
                }
            }
        }
        if builder.rows() > 0 {
            send(&mut builder, batches)?;
        }
        Ok(())
    }

    /// Rows by ranges of an index. All uncommitted rows of the transaction come too, whatever their values: the predicate
    /// runs above, and there are few.
    fn by_index(
        &mut self,
        index: &Arc<Index>,
        ranges: &[KeyRange],
        builder: &mut RowBatchBuilder,
        batches: &Batches,
    ) -> std::result::Result<(), SqlError> {
        let env = self.env.clone();
        let none = BTreeMap::new();
        let pending = env.overlay.rows.get(&(self.table.id, self.scope.clone())).unwrap_or(&none);
        for range in ranges {
            let mut stored = env.snapshot.scan_index(&self.table, index, &self.scope, range);
            while let Some((key, image)) = stored.next_row()? {
                if !pending.contains_key(key)
                    && let Wanted::Enough = self.take(Some(image), builder, batches)?
                {
                    return Ok(());
                }
            }
        }
        for image in pending.values() {
            if let Wanted::Enough = self.take(image.as_deref(), builder, batches)? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// One range of stored rows, with the uncommitted rows of the transaction merged in by key.
    fn range(
        &mut self,
        range: KeyRange,
        builder: &mut RowBatchBuilder,
        batches: &Batches,
    ) -> std::result::Result<Wanted, SqlError> {
        let env = self.env.clone();
        let none = BTreeMap::new();
        let pending = env.overlay.rows.get(&(self.table.id, self.scope.clone())).unwrap_or(&none);
        // Bounds may be partial keys, which the map does not know: it gives the start, `contains` says the end.
        let mut pending = pending
            .range::<[u8], _>((lower(&range.start).as_ref().map(Vec::as_slice), Bound::Unbounded))
            .take_while(|(key, _)| range.contains(key))
            .peekable();
        let mut stored = env.snapshot.scan(&self.table, &self.scope, range.clone());
        while let Some((key, image)) = stored.next_row()? {
            let mut replaced = false;
            while let Some((at, change)) = pending.next_if(|(at, _)| at.as_slice() <= key) {
                replaced |= at.as_slice() == key;
                if let Wanted::Enough = self.take(change.as_deref(), builder, batches)? {
                    return Ok(Wanted::Enough);
                }
            }
            if !replaced && let Wanted::Enough = self.take(Some(image), builder, batches)? {
                return Ok(Wanted::Enough);
            }
        }
        for (_, change) in pending {
            if let Wanted::Enough = self.take(change.as_deref(), builder, batches)? {
                return Ok(Wanted::Enough);
            }
        }
        Ok(Wanted::More)
    }

    fn take(
        &mut self,
        image: Option<&[u8]>,
        builder: &mut RowBatchBuilder,
        batches: &Batches,
    ) -> std::result::Result<Wanted, SqlError> {
        let Some(image) = image else { return Ok(Wanted::More) };
        if self.left == 0 {
            return Ok(Wanted::Enough);
        }
        let (image, ..) = ImageRef::parse(image).map_err(|error| StoreError::Corrupt(error.to_string()))?;
        builder.push(&image)?;
        self.left -= 1;
        if builder.rows() >= self.next_rows || builder.bytes() >= BATCH_BYTES {
            if !send(builder, batches)? {
                return Ok(Wanted::Enough);
            }
            self.next_rows = (self.next_rows * 4).min(self.batch_rows);
        }
        Ok(if self.left == 0 { Wanted::Enough } else { Wanted::More })
    }
}

/// Waits for room; `false` when the reader has gone.
fn send(builder: &mut RowBatchBuilder, batches: &Batches) -> std::result::Result<bool, SqlError> {
    let batch = builder.finish()?;
    Ok(batches.blocking_send(Ok(batch)).is_ok())
}

/// Where the keys of a range may begin: behind everything that starts with an excluded (partial) key.
fn lower(start: &Bound<Vec<u8>>) -> Bound<Vec<u8>> {
    match start {
        Bound::Excluded(key) => successor(key).map_or_else(|| Bound::Excluded(key.clone()), Bound::Included),
        other => other.clone(),
    }
}
