//! Row images to Arrow and back; SQL types to Arrow types and back.

use std::sync::Arc;

use ::arrow::datatypes::{DataType, SchemaRef};
use ::arrow::record_batch::RecordBatch;
use wire::{ImageRef, Schema, Type};

use super::SqlError;

pub fn arrow_type(_ty: Type) -> DataType {
    todo!()
}

/// The Arrow schema of a wire schema; each field's metadata names the SQL type (so that TEXT and JSON stay apart).
pub fn arrow_schema(_schema: &Schema) -> SchemaRef {
    let _ = Arc::new(());
    todo!()
}

/// Images to a batch of the columns of `schema`, in its order.
pub fn to_batch(_schema: &Schema, _images: &[ImageRef<'_>]) -> Result<RecordBatch, SqlError> {
    todo!()
}
