//! One commit as one postcard message.
//!
//! A frame is a header and a list of sections, one per row scope: the change log keeps the whole frame, the window's
//! ring gets the bytes of the shared section, and a user's section goes only to instances of that user. A section is
//! a list of changes; a change has a fixed header with the offsets of its parts, counted from the change's first byte,
//! so that a reader holding the change's offset loads any column directly.
//!
//! The frame carries commit id, commit time and every evaluated value, but neither seq nor epoch: whoever orders
//! commits assigns those.

use alloc::{collections::BTreeMap, string::String, vec::Vec};
use core::fmt;
use serde::{Deserialize, Serialize};

use crate::image::{Image, ImageAt, ImageError, ImageRef, put_varint, take, take_varint};
use crate::value::Kind;

/// The frame format this crate writes and reads.
pub const FRAME_FORMAT: u16 = 1;

/// Bytes of a [`ChangeHeader`].
pub const CHANGE_HEADER_BYTES: usize = 44;

/// What happened to a row. The numbers are ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    Insert = 1,
    Update = 2,
    Delete = 3,
}

impl Op {
    pub fn as_str(self) -> &'static str {
        match self {
            Op::Insert => "insert",
            Op::Update => "update",
            Op::Delete => "delete",
        }
    }

    pub fn from_byte(byte: u8) -> Option<Op> {
        match byte {
            1 => Some(Op::Insert),
            2 => Some(Op::Update),
            3 => Some(Op::Delete),
            _ => None,
        }
    }
}

/// Whose rows a section holds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Scope {
    /// Rows of shared and stream tables.
    Shared,
    /// One user's rows of user tables.
    User(String),
}

/// A catalog change that happened at this commit's place in the order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CatalogEvent {
    TableCreated {
        table: u32,
    },
    TableDropped {
        table: u32,
    },
    PluginActivated {
        name: String,
        version: u32,
    },
    PluginDropped {
        name: String,
    },
    /// From here on the table's rows are at this schema version, and its name may be another.
    TableAltered {
        table: u32,
        schema_version: u32,
    },
}

/// The frame as postcard sees it: `postcard::from_bytes::<Frame>` decodes any frame. The host and plugins read frames
/// in place through [`FrameView`]; this type is for tools and for the proof that the bytes are postcard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    #[serde(with = "postcard::fixint::le")]
    pub format: u16,
    #[serde(with = "postcard::fixint::le")]
    pub namespace: u32,
    pub commit_id: [u8; 16],
    /// Microseconds since 1970-01-01T00:00:00Z.
    #[serde(with = "postcard::fixint::le")]
    pub committed_at: i64,
    pub catalog: Vec<CatalogEvent>,
    pub sections: Vec<Section>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    pub scope: Scope,
    pub changes: Vec<Change>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    pub header: ChangeHeader,
    /// Bit i of byte i/8: column i differs between old and new (a missing image counts as all NULL).
    pub changed: Vec<u8>,
    pub old: Option<Image>,
    pub new: Option<Image>,
}

/// The fixed front of a change. Offsets count from the header's first byte; 0 means there is no such part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeHeader {
    /// Bytes of the whole change.
    #[serde(with = "postcard::fixint::le")]
    pub len: u32,
    #[serde(with = "postcard::fixint::le")]
    pub table: u32,
    #[serde(with = "postcard::fixint::le")]
    pub schema_version: u32,
    /// An [`Op`].
    pub op: u8,
    /// Reserved, 0.
    pub flags: u8,
    #[serde(with = "postcard::fixint::le")]
    pub columns: u16,
    #[serde(with = "postcard::fixint::le")]
    pub changed: u32,
    #[serde(with = "postcard::fixint::le")]
    pub old_present: u32,
    #[serde(with = "postcard::fixint::le")]
    pub old_slots: u32,
    #[serde(with = "postcard::fixint::le")]
    pub old_heap: u32,
    #[serde(with = "postcard::fixint::le")]
    pub new_present: u32,
    #[serde(with = "postcard::fixint::le")]
    pub new_slots: u32,
    #[serde(with = "postcard::fixint::le")]
    pub new_heap: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// Written by a newer (or no) Tidegate.
    Format(u16),
    Truncated,
    /// What does not fit.
    Malformed(&'static str),
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FrameError::Format(found) => write!(f, "frame format {found} is not {FRAME_FORMAT}"),
            FrameError::Truncated => f.write_str("frame is truncated"),
            FrameError::Malformed(what) => write!(f, "frame is malformed: {what}"),
        }
    }
}

impl core::error::Error for FrameError {}

impl From<ImageError> for FrameError {
    fn from(error: ImageError) -> Self {
        match error {
            ImageError::Truncated => FrameError::Truncated,
            ImageError::Malformed => FrameError::Malformed("row image"),
        }
    }
}

impl From<postcard::Error> for FrameError {
    fn from(error: postcard::Error) -> Self {
        match error {
            postcard::Error::DeserializeUnexpectedEnd => FrameError::Truncated,
            _ => FrameError::Malformed("header"),
        }
    }
}

/// A table row before or after a change: encoded image bytes at the schema version the change names.
pub type ImageBytes<'a> = &'a [u8];

/// Writes a frame; each change is encoded once, here.
#[derive(Debug)]
pub struct FrameBuilder {
    namespace: u32,
    commit_id: [u8; 16],
    committed_at: i64,
    catalog: Vec<CatalogEvent>,
    sections: BTreeMap<Scope, (usize, Vec<u8>)>,
}

/// What one change says beside its images.
#[derive(Clone, Copy, Debug)]
pub struct ChangeMeta<'a> {
    pub table: u32,
    pub schema_version: u32,
    /// The physical kind of every slot, by column id, to tell which columns changed.
    pub kinds: &'a [Kind],
}

impl FrameBuilder {
    pub fn new(namespace: u32, commit_id: [u8; 16], committed_at: i64) -> Self {
        FrameBuilder { namespace, commit_id, committed_at, catalog: Vec::new(), sections: BTreeMap::new() }
    }

    pub fn catalog(&mut self, event: CatalogEvent) {
        self.catalog.push(event);
    }

    /// Adds a change. The op follows from which images there are; with neither, there is no change to add.
    pub fn change(
        &mut self,
        scope: &Scope,
        meta: ChangeMeta<'_>,
        old: Option<ImageBytes<'_>>,
        new: Option<ImageBytes<'_>>,
    ) -> Result<(), FrameError> {
        let op = match (old, new) {
            (None, None) => return Err(FrameError::Malformed("a change without images")),
            (None, Some(_)) => Op::Insert,
            (Some(_), Some(_)) => Op::Update,
            (Some(_), None) => Op::Delete,
        };
        let columns = meta.kinds.len() as u16;
        let (old_image, new_image) = (whole_image(old, columns)?, whole_image(new, columns)?);
        let changed = changed_columns(meta.kinds, old_image.map(|i| i.0), new_image.map(|i| i.0));

        // The parts in order: header, varint + bitmap, tag [+ old image], tag [+ new image].
        let mut tail = Vec::with_capacity(changed.len() + old.map_or(0, <[u8]>::len) + new.map_or(0, <[u8]>::len) + 8);
        let here = |tail: &Vec<u8>| (CHANGE_HEADER_BYTES + tail.len()) as u32;
        put_varint(&mut tail, changed.len());
        let mut header = ChangeHeader {
            table: meta.table,
            schema_version: meta.schema_version,
            op: op as u8,
            columns,
            changed: here(&tail),
            ..ChangeHeader::default()
        };
        tail.extend_from_slice(&changed);
        tail.push(u8::from(old.is_some()));
        if let (Some(bytes), Some((_, at))) = (old, old_image) {
            let start = here(&tail);
            (header.old_present, header.old_slots, header.old_heap) =
                (start + at.present, start + at.slots, start + at.heap);
            tail.extend_from_slice(bytes);
        }
        tail.push(u8::from(new.is_some()));
        if let (Some(bytes), Some((_, at))) = (new, new_image) {
            let start = here(&tail);
            (header.new_present, header.new_slots, header.new_heap) =
                (start + at.present, start + at.slots, start + at.heap);
            tail.extend_from_slice(bytes);
        }
        header.len = here(&tail);

        let (count, section) = self.sections.entry(scope.clone()).or_default();
        *count += 1;
        *section = postcard::to_extend(&header, core::mem::take(section))?;
        section.extend_from_slice(&tail);
        Ok(())
    }

    /// Bytes so far, near enough to hold a commit to its limit while it grows.
    pub fn len(&self) -> usize {
        self.sections.values().map(|(_, bytes)| bytes.len() + 32).sum::<usize>() + 64
    }

    pub fn is_empty(&self) -> bool {
        self.sections.is_empty() && self.catalog.is_empty()
    }

    pub fn finish(self) -> Result<Vec<u8>, FrameError> {
        let mut out = Vec::with_capacity(self.len());
        out.extend_from_slice(&FRAME_FORMAT.to_le_bytes());
        out.extend_from_slice(&self.namespace.to_le_bytes());
        out.extend_from_slice(&self.commit_id);
        out.extend_from_slice(&self.committed_at.to_le_bytes());
        out = postcard::to_extend(&self.catalog, out)?;
        put_varint(&mut out, self.sections.len());
        for (scope, (count, changes)) in &self.sections {
            out = postcard::to_extend(scope, out)?;
            put_varint(&mut out, *count);
            out.extend_from_slice(changes);
        }
        Ok(out)
    }
}

fn whole_image(bytes: Option<ImageBytes<'_>>, columns: u16) -> Result<Option<(ImageRef<'_>, ImageAt)>, FrameError> {
    let Some(bytes) = bytes else { return Ok(None) };
    let (image, at, used) = ImageRef::parse(bytes)?;
    if used != bytes.len() || image.columns() != columns {
        return Err(FrameError::Malformed("image does not fit its schema"));
    }
    Ok(Some((image, at)))
}

/// The bitmap of changed columns: bit i of byte i/8 = column i, of that kind, differs (a missing image counts as NULLs).
pub fn changed_columns(kinds: &[Kind], old: Option<ImageRef<'_>>, new: Option<ImageRef<'_>>) -> Vec<u8> {
    let mut changed = alloc::vec![0u8; kinds.len().div_ceil(8)];
    for (i, kind) in kinds.iter().enumerate() {
        let column = i as u16;
        let differs = match (&old, &new) {
            (Some(old), Some(new)) => !old.same(new, column, *kind),
            (Some(one), None) | (None, Some(one)) => !one.is_null(column),
            (None, None) => false,
        };
        changed[i / 8] |= u8::from(differs) << (i % 8);
    }
    changed
}

/// A frame read in place.
#[derive(Clone, Debug)]
pub struct FrameView<'a> {
    pub namespace: u32,
    pub commit_id: [u8; 16],
    pub committed_at: i64,
    pub catalog: Vec<CatalogEvent>,
    pub sections: Vec<SectionView<'a>>,
}

/// One section. `bytes` is the section whole, as the ring carries it; offsets in its changes count from there.
#[derive(Clone, Debug)]
pub struct SectionView<'a> {
    pub scope: Scope,
    pub bytes: &'a [u8],
    pub changes: Vec<ChangeView<'a>>,
}

/// One change. The `ImageAt`s count from the section's first byte.
#[derive(Clone, Copy, Debug)]
pub struct ChangeView<'a> {
    pub header: ChangeHeader,
    pub op: Op,
    /// Offset of the change in its section.
    pub offset: u32,
    pub changed: &'a [u8],
    pub old: Option<(ImageRef<'a>, ImageAt)>,
    pub new: Option<(ImageRef<'a>, ImageAt)>,
}

/// Where the parts of a change lie, from some base. What a pipeline is given: images that do not concern it (a row that
/// does not match) are taken out, and the op follows from which ones are left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChangeAt {
    /// The bitmap of changed columns, and how many columns it speaks of; of use only while both images are there.
    pub changed: u32,
    pub columns: u16,
    pub old: Option<ImageAt>,
    pub new: Option<ImageAt>,
}

impl ChangeAt {
    /// `None`: nothing is left of the change.
    pub fn op(&self) -> Option<Op> {
        match (self.old, self.new) {
            (None, Some(_)) => Some(Op::Insert),
            (Some(_), Some(_)) => Some(Op::Update),
            (Some(_), None) => Some(Op::Delete),
            (None, None) => None,
        }
    }
}

impl<'a> FrameView<'a> {
    /// Reads the outline of a frame: everything is checked, no row is decoded or copied.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, FrameError> {
        let mut at = 0;
        let format = u16::from_le_bytes(fixed(bytes, &mut at)?);
        if format != FRAME_FORMAT {
            return Err(FrameError::Format(format));
        }
        let namespace = u32::from_le_bytes(fixed(bytes, &mut at)?);
        let commit_id = fixed(bytes, &mut at)?;
        let committed_at = i64::from_le_bytes(fixed(bytes, &mut at)?);
        let (catalog, rest) = postcard::take_from_bytes(&bytes[at..])?;
        at = bytes.len() - rest.len();
        let count = take_varint(bytes, &mut at)?;
        let mut sections = Vec::new();
        for _ in 0..count {
            sections.push(SectionView::take(bytes, &mut at)?);
        }
        if at != bytes.len() {
            return Err(FrameError::Malformed("bytes after the last section"));
        }
        Ok(FrameView { namespace, commit_id, committed_at, catalog, sections })
    }

    pub fn section(&self, scope: &Scope) -> Option<&SectionView<'a>> {
        self.sections.iter().find(|section| section.scope == *scope)
    }
}

impl<'a> SectionView<'a> {
    fn take(bytes: &'a [u8], at: &mut usize) -> Result<Self, FrameError> {
        let start = *at;
        let (scope, rest) = postcard::take_from_bytes(&bytes[start..])?;
        *at = bytes.len() - rest.len();
        let count = take_varint(bytes, at)?;
        let mut changes = Vec::new();
        for _ in 0..count {
            changes.push(ChangeView::take(bytes, at, start)?);
        }
        Ok(SectionView { scope, bytes: &bytes[start..*at], changes })
    }
}

impl<'a> ChangeView<'a> {
    fn take(bytes: &'a [u8], at: &mut usize, section: usize) -> Result<Self, FrameError> {
        let start = *at;
        let (header, rest): (ChangeHeader, _) = postcard::take_from_bytes(&bytes[start..])?;
        *at = bytes.len() - rest.len();
        let op = Op::from_byte(header.op).ok_or(FrameError::Malformed("unknown op"))?;
        let changed_len = take_varint(bytes, at)?;
        let changed = take(bytes, at, changed_len)?;
        let old = take_image(bytes, at, section)?;
        let new = take_image(bytes, at, section)?;
        if *at - start != header.len as usize {
            return Err(FrameError::Malformed("length of a change"));
        }
        let offset = (start - section) as u32;
        Ok(ChangeView { header, op, offset, changed, old, new })
    }

    /// Its places, counted from the section's first byte.
    pub fn at(&self) -> ChangeAt {
        ChangeAt {
            changed: self.offset + self.header.changed,
            columns: self.header.columns,
            old: self.old.map(|(_, at)| at),
            new: self.new.map(|(_, at)| at),
        }
    }

    pub fn is_changed(&self, column: u16) -> bool {
        let i = usize::from(column);
        self.changed.get(i / 8).is_some_and(|byte| byte >> (i % 8) & 1 == 1)
    }
}

fn take_image<'a>(
    bytes: &'a [u8],
    at: &mut usize,
    section: usize,
) -> Result<Option<(ImageRef<'a>, ImageAt)>, FrameError> {
    match take(bytes, at, 1)?[0] {
        0 => Ok(None),
        1 => {
            let base = (*at - section) as u32;
            let (image, place, used) = ImageRef::parse(&bytes[*at..])?;
            *at += used;
            let place = ImageAt {
                present: base + place.present,
                slots: base + place.slots,
                heap: base + place.heap,
                columns: place.columns,
            };
            Ok(Some((image, place)))
        }
        _ => Err(FrameError::Malformed("option tag")),
    }
}

fn fixed<const N: usize>(bytes: &[u8], at: &mut usize) -> Result<[u8; N], FrameError> {
    let part = take(bytes, at, N)?;
    let mut out = [0; N];
    out.copy_from_slice(part);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageBuilder;
    use alloc::string::ToString;
    use proptest::prelude::*;

    const KINDS: [Kind; 2] = [Kind::Int, Kind::Text];

    fn image(id: i64, text: Option<&str>) -> Vec<u8> {
        let mut builder = ImageBuilder::new(2);
        builder.set_int(0, id);
        if let Some(text) = text {
            builder.set_bytes(1, text.as_bytes());
        }
        builder.finish()
    }

    fn frame(rows: &[(Option<String>, Option<String>)]) -> Vec<u8> {
        let mut builder = FrameBuilder::new(7, [9; 16], -5);
        builder.catalog(CatalogEvent::TableCreated { table: 3 });
        let meta = ChangeMeta { table: 3, schema_version: 1, kinds: &KINDS };
        for (i, (old, new)) in rows.iter().enumerate() {
            let scope = if i % 2 == 0 { Scope::Shared } else { Scope::User("ann".to_string()) };
            let old = old.as_ref().map(|text| image(i as i64, Some(text)));
            let new = new.as_ref().map(|text| image(i as i64, Some(text)));
            let _ = builder.change(&scope, meta, old.as_deref(), new.as_deref());
        }
        builder.finish().unwrap()
    }

    proptest! {
        #[test]
        fn a_frame_is_postcard_and_reads_in_place(rows in proptest::collection::vec(any::<(Option<String>, Option<String>)>(), 0..20)) {
            let bytes = frame(&rows);
            let typed: Frame = postcard::from_bytes(&bytes).unwrap();
            prop_assert_eq!(&postcard::to_allocvec(&typed).unwrap(), &bytes);

            let view = FrameView::parse(&bytes).unwrap();
            prop_assert_eq!(view.sections.len(), typed.sections.len());
            for (section, typed) in view.sections.iter().zip(&typed.sections) {
                for (change, typed) in section.changes.iter().zip(&typed.changes) {
                    prop_assert_eq!(change.header, typed.header);
                    let at = change.at();
                    prop_assert_eq!(&section.bytes[at.changed as usize..][..change.changed.len()], change.changed);
                    prop_assert_eq!(at.op(), Some(change.op));
                    // With one image alone, that image's bitmap says which columns differ from NULL.
                    if let (Some(one), None) | (None, Some(one)) = (at.old, at.new) {
                        prop_assert_eq!(&section.bytes[one.present as usize..][..change.changed.len()], change.changed);
                    }
                    // The header's offsets, from the change's start, are where the images really lie.
                    for (image, present, slots, heap) in [
                        (change.old, change.header.old_present, change.header.old_slots, change.header.old_heap),
                        (change.new, change.header.new_present, change.header.new_slots, change.header.new_heap),
                    ] {
                        match image {
                            None => prop_assert_eq!((present, slots, heap), (0, 0, 0)),
                            Some((image, at)) => {
                                let base = change.offset;
                                prop_assert_eq!((base + present, base + slots, base + heap), (at.present, at.slots, at.heap));
                                let slot = section.bytes[at.slots as usize..][..8].try_into().unwrap();
                                prop_assert_eq!(Some(i64::from_le_bytes(slot)), image.int(0));
                            }
                        }
                    }
                }
            }
        }

        #[test]
        fn damaged_frames_are_refused_without_panic(cut in 0usize..400, flip in 0usize..400, bit in 0u8..8) {
            let mut bytes = frame(&[(None, Some("a".into())), (Some("b".into()), None), (Some("c".into()), Some("d".into()))]);
            let len = bytes.len();
            bytes[flip % len] ^= 1 << bit;
            let _ = FrameView::parse(&bytes);
            prop_assert!(FrameView::parse(&bytes[..cut % len]).is_err());
        }
    }

    #[test]
    fn changed_columns_are_marked() {
        let mut builder = FrameBuilder::new(1, [0; 16], 0);
        let meta = ChangeMeta { table: 1, schema_version: 1, kinds: &KINDS };
        builder.change(&Scope::Shared, meta, Some(&image(1, None)), Some(&image(1, Some("x")))).unwrap();
        let bytes = builder.finish().unwrap();
        let view = FrameView::parse(&bytes).unwrap();
        let change = view.sections[0].changes[0];
        assert_eq!(change.op, Op::Update);
        assert!(!change.is_changed(0) && change.is_changed(1) && !change.is_changed(2));
    }

    #[test]
    fn the_bytes_are_pinned() {
        let mut builder = FrameBuilder::new(1, [2; 16], 3);
        let meta = ChangeMeta { table: 4, schema_version: 5, kinds: &KINDS };
        builder.change(&Scope::Shared, meta, None, Some(&image(6, Some("hi")))).unwrap();
        let bytes = builder.finish().unwrap();
        #[rustfmt::skip]
        let expected: &[u8] = &[
            1, 0, 1, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 0, 0, 0, 0, 0, 0, 0, // header
            0, // no catalog events
            1, 0, 1, // one section, shared, one change
            70, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0, 1, 0, 2, 0, 45, 0, 0, 0, // len, table, version, op, flags, columns, changed
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // no old image
            49, 0, 0, 0, 51, 0, 0, 0, 68, 0, 0, 0, // new: present, slots, heap
            1, 0b11, 0, 1, // changed bitmap; no old; new follows
            1, 0b11, 2, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 2, b'h', b'i',
        ];
        assert_eq!(bytes, expected);
    }
}
