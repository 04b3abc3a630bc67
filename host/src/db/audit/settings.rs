//! Which settings are others than at the last start. Of their values only digests are kept, with a salt: some of them
//! are secrets.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::config::Config;

const RECORD_VERSION: u8 = 1;

type Short = [u8; 16];

/// The settings of a start.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Seen {
    pub(super) salt: Short,
    /// Name and digest of the value.
    settings: Vec<(String, Short)>,
}

impl Seen {
    pub(super) fn of(config: &Config, salt: Short) -> Seen {
        let settings = config.settings().into_iter().map(|(name, value)| {
            // What is shown of a secret does not change with it.
            let value = secret(config, &name).unwrap_or(value);
            let digest = digest(&salt, &name, &value);
            (name, digest)
        });
        Seen { salt, settings: settings.collect() }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, vec![RECORD_VERSION]).expect("text and digests have bytes")
    }

    /// `None`: they cannot be read, and are as good as none.
    pub(super) fn decode(bytes: &[u8]) -> Option<Seen> {
        postcard::from_bytes(bytes.strip_prefix(&[RECORD_VERSION])?).ok()
    }

    /// Names of the settings that have another value now, are new, or are gone.
    pub(super) fn changed<'a>(&'a self, now: &'a Seen) -> Vec<&'a str> {
        let differ = now.settings.iter().filter(|setting| !self.settings.contains(setting));
        let gone = self.settings.iter().filter(|(name, _)| now.settings.iter().all(|(other, _)| other != name));
        differ.chain(gone).map(|(name, _)| name.as_str()).collect()
    }
}

fn secret(config: &Config, name: &str) -> Option<String> {
    match name {
        "admin_token" => config.admin_token.clone(),
        "tokens" => {
            let tokens = config.tokens.iter().map(|token| (&token.user, token.role, &token.token));
            let mut tokens: Vec<_> = tokens.collect();
            tokens.sort();
            Some(format!("{tokens:?}"))
        }
        _ => None,
    }
}

fn digest(salt: &Short, name: &str, value: &str) -> Short {
    let mut hash = Sha256::new();
    hash.update(salt);
    hash.update((name.len() as u64).to_le_bytes());
    hash.update(name);
    hash.update(value);
    let mut short = Short::default();
    short.copy_from_slice(&hash.finalize()[..16]);
    short
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{Role, Token};

    #[test]
    fn what_differs_is_named_and_no_value_is_kept() {
        let mut config = Config::new(Path::new("somewhere"));
        let token = |token: &str| Token { token: token.to_owned(), user: "alice".to_owned(), role: Role::User };
        config.tokens = vec![token("0123456789abcdef"), token("fedcba9876543210")];
        let first = Seen::of(&config, [7; 16]);
        assert_eq!(Seen::decode(&first.encode()), Some(Seen::of(&config, [7; 16])));
        assert_eq!(Seen::decode(b""), None);
        let bytes = first.encode();
        assert!(!bytes.windows(16).any(|part| part == b"0123456789abcdef"));
        assert_ne!(Seen::of(&config, [8; 16]).settings, first.settings);

        config.tokens.reverse();
        assert!(first.changed(&Seen::of(&config, [7; 16])).is_empty(), "the order means nothing");
        config.tokens[0] = token("another-one-0123");
        config.http.max_connections += 1;
        let mut second = Seen::of(&config, [7; 16]);
        assert_eq!(first.changed(&second), ["tokens", "server.max_connections"]);
        second.settings.retain(|(name, _)| name != "log.format");
        assert_eq!(first.changed(&second), ["tokens", "server.max_connections", "log.format"]);
        assert_eq!(second.changed(&Seen::of(&config, [7; 16])), ["log.format"]);
    }
}
