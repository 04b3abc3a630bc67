//! A small file beside the database that says how far the history had certainly come.
//!
//! RocksDB cannot tell a directory that was rolled back (an old copy put in its place, a write-ahead log deleted by
//! hand) from one that never held more. The file is written after commits are durable, so it is a lower bound; a
//! database behind it has lost acknowledged commits, and clients hold positions that would come to mean other commits.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::{Epoch, Seq, StoreError};

const TITLE: &str = "tidegate high-water 1";

pub(super) fn path(directory: &Path) -> PathBuf {
    directory.join("high-water")
}

/// `None` where there is no such file: a new directory, or a crash between its creation and the first writing.
pub(super) fn read(directory: &Path) -> Result<Option<(Epoch, Seq)>, StoreError> {
    let path = path(directory);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    match parse(&text) {
        Some(found) => Ok(Some(found)),
        None => Err(StoreError::Corrupt(format!(
            "{} does not read as a high-water file; if the database beside it is the right one, remove this file",
            path.display()
        ))),
    }
}

/// Replaces the file as one step: a crash leaves the old one or the new one.
pub(super) fn write(directory: &Path, epoch: Epoch, applied: Seq) -> std::io::Result<()> {
    let path = path(directory);
    let fresh = path.with_extension("new");
    let mut file = File::create(&fresh)?;
    write!(file, "{TITLE}\nepoch {:016x}\napplied {}\n", epoch.0, applied.0)?;
    file.sync_all()?;
    fs::rename(&fresh, &path)?;
    File::open(directory)?.sync_all()
}

/// Refuses a database that is behind its high-water mark, or of another history.
pub(super) fn check(directory: &Path, epoch: Epoch, applied: Seq) -> Result<(), StoreError> {
    let Some((known_epoch, known)) = read(directory)? else { return Ok(()) };
    let found = if known_epoch != epoch {
        "another history".to_owned()
    } else if applied < known {
        format!("commits up to {} only", applied.0)
    } else {
        return Ok(());
    };
    Err(StoreError::Corrupt(format!(
        "the database in {} was rolled back or replaced: it holds {found}, but {} commits of history {:016x} were \
         acknowledged. Put the newer files back; or, to accept the loss, remove {}",
        directory.display(),
        known.0,
        known_epoch.0,
        path(directory).display(),
    )))
}

fn parse(text: &str) -> Option<(Epoch, Seq)> {
    let mut lines = text.lines();
    if lines.next()? != TITLE {
        return None;
    }
    let epoch = u64::from_str_radix(lines.next()?.strip_prefix("epoch ")?, 16).ok()?;
    let applied = lines.next()?.strip_prefix("applied ")?.parse().ok()?;
    lines.next().is_none().then_some((Epoch(epoch), Seq(applied)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_read_and_held_against_the_database() {
        let dir = tempfile::tempdir().unwrap();
        let (epoch, other) = (Epoch(0xab), Epoch(1));
        assert_eq!(read(dir.path()).unwrap(), None);
        check(dir.path(), epoch, Seq(0)).unwrap();
        write(dir.path(), epoch, Seq(41)).unwrap();
        write(dir.path(), epoch, Seq(42)).unwrap();
        assert_eq!(
            fs::read_to_string(path(dir.path())).unwrap(),
            "tidegate high-water 1\nepoch 00000000000000ab\napplied 42\n"
        );
        check(dir.path(), epoch, Seq(42)).unwrap();
        check(dir.path(), epoch, Seq(43)).unwrap();
        for (epoch, applied) in [(epoch, Seq(41)), (other, Seq(99))] {
            let error = check(dir.path(), epoch, applied).unwrap_err();
            assert!(matches!(&error, StoreError::Corrupt(why) if why.contains("rolled back")), "{error}");
        }
        fs::write(path(dir.path()), "nonsense").unwrap();
        assert!(matches!(read(dir.path()), Err(StoreError::Corrupt(_))));
    }
}
