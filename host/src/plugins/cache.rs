//! Compiled modules on disk, so that a start compiles nothing again. Loading compiled code is running it: a file is
//! believed only when its MAC holds, under a key that lives in the store, and it is checked in memory, on the very
//! bytes that are loaded.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// Bytes of the key, and of the MAC in front of the code.
pub const KEY_BYTES: usize = 32;
const MAC_BYTES: usize = 32;

/// SHA-256's block, which HMAC pads its key to.
const BLOCK_BYTES: usize = 64;

/// No module within its limits compiles to more.
const FILE_BYTES: u64 = 256 << 20;

pub struct Cache {
    folder: PathBuf,
    key: [u8; KEY_BYTES],
    /// What else has to be the same for code to fit: the engine's version and settings, the machine.
    compatibility: u64,
}

impl Cache {
    pub fn new(folder: PathBuf, key: [u8; KEY_BYTES], compatibility: u64) -> std::io::Result<Cache> {
        fs::create_dir_all(&folder)?;
        Ok(Cache { folder, key, compatibility })
    }

    /// The compiled code of a module, if it is there and nobody else wrote it.
    pub fn load(&self, sha256: &str) -> Option<Vec<u8>> {
        let path = self.path(sha256);
        let bytes = match read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a compiled plugin cannot be read; it is compiled again");
                return None;
            }
        };
        let (found, code) = bytes.split_at_checked(MAC_BYTES).unwrap_or_default();
        if !bool::from(found.ct_eq(&self.mac(sha256, code))) {
            tracing::warn!(
                path = %path.display(),
                "a compiled plugin is not as this server wrote it; it is not loaded, but compiled again"
            );
            // It would be found and said again at every start.
            let _ = fs::remove_file(&path);
            return None;
        }
        Some(code.to_vec())
    }

    /// Keeps compiled code. Failing costs only another compilation, and is said in the log.
    pub fn store(&self, sha256: &str, code: &[u8]) {
        if let Err(error) = self.write(sha256, code) {
            tracing::warn!(folder = %self.folder.display(), %error, "a compiled plugin cannot be kept");
        }
    }

    fn write(&self, sha256: &str, code: &[u8]) -> std::io::Result<()> {
        let path = self.path(sha256);
        // Written whole under another name first: a crash leaves no half file under the real one.
        let draft = path.with_extension("new");
        let mut file = fs::File::create(&draft)?;
        file.write_all(&self.mac(sha256, code))?;
        file.write_all(code)?;
        fs::rename(&draft, &path)
    }

    /// Removes what no module of the server needs any more.
    pub fn sweep(&self, needed: impl Fn(&str) -> bool) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let keep = name
                .to_str()
                .and_then(|name| name.split_once('-'))
                .is_some_and(|(sha256, rest)| needed(sha256) && rest == format!("{:016x}.bin", self.compatibility));
            if !keep && let Err(error) = fs::remove_file(entry.path()) {
                tracing::warn!(path = %entry.path().display(), %error, "an old compiled plugin cannot be removed");
            }
        }
    }

    fn path(&self, sha256: &str) -> PathBuf {
        self.folder.join(format!("{sha256}-{:016x}.bin", self.compatibility))
    }

    /// HMAC-SHA-256 over what the code is of, and the code.
    fn mac(&self, sha256: &str, code: &[u8]) -> [u8; MAC_BYTES] {
        let pad = |byte: u8| {
            let mut block = [byte; BLOCK_BYTES];
            block.iter_mut().zip(self.key).for_each(|(block, key)| *block ^= key);
            block
        };
        let mut inner = Sha256::new();
        inner.update(pad(0x36));
        inner.update(self.compatibility.to_le_bytes());
        inner.update((sha256.len() as u64).to_le_bytes());
        inner.update(sha256);
        inner.update(code);
        let mut outer = Sha256::new();
        outer.update(pad(0x5c));
        outer.update(inner.finalize());
        outer.finalize().into()
    }
}

fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    if fs::metadata(path)?.len() > FILE_BYTES {
        return Err(ErrorKind::FileTooLarge.into());
    }
    fs::read(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_written_here_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let open = |key: u8, compatibility| Cache::new(folder.path().to_owned(), [key; 32], compatibility).unwrap();
        let cache = open(1, 7);
        assert_eq!(cache.load("ab"), None);
        cache.store("ab", b"code");
        assert_eq!(cache.load("ab").as_deref(), Some(&b"code"[..]));
        assert_eq!(open(1, 8).load("ab"), None, "of another engine");
        let path = cache.path("ab");
        let whole = fs::read(&path).unwrap();
        for (what, bytes) in [
            ("a flipped bit", {
                let mut bytes = whole.clone();
                *bytes.last_mut().unwrap() ^= 1;
                bytes
            }),
            ("a byte more", [&whole[..], &[0]].concat()),
            ("cut short", whole[..whole.len() - 1].to_vec()),
            ("only a part of the MAC", whole[..9].to_vec()),
            ("nothing", Vec::new()),
        ] {
            fs::write(&path, bytes).unwrap();
            assert_eq!(cache.load("ab"), None, "{what}");
            assert!(!path.exists(), "{what}");
        }
        // The code of one module under another's name, and a file of another key.
        cache.store("ab", b"code");
        fs::copy(&path, cache.path("cd")).unwrap();
        assert_eq!(cache.load("cd"), None);
        assert_eq!(open(2, 7).load("ab"), None);
    }

    #[test]
    fn the_mac_is_hmac() {
        // RFC 4231 has no vector with our prefix; the construction is checked against one written out here.
        let cache = Cache { folder: PathBuf::new(), key: [3; 32], compatibility: 1 };
        let message = [&1u64.to_le_bytes()[..], &2u64.to_le_bytes(), b"ab", b"code"].concat();
        let block = |byte: u8| -> Vec<u8> { (0..64).map(|i| if i < 32 { 3 ^ byte } else { byte }).collect() };
        let inner = Sha256::digest([block(0x36), message].concat());
        let expected = Sha256::digest([block(0x5c), inner.to_vec()].concat());
        assert_eq!(cache.mac("ab", b"code")[..], expected[..]);
    }

    #[test]
    fn what_nobody_needs_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path().to_owned(), [1; 32], 7).unwrap();
        cache.store("ab", b"code");
        cache.store("cd", b"code");
        fs::write(folder.path().join("ab-0000000000000008.bin"), b"of another engine").unwrap();
        fs::write(folder.path().join("ab-0000000000000007.new"), b"half").unwrap();
        cache.sweep(|sha256| sha256 == "ab");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(cache.load("ab").is_some());
    }
}
