//! Who asks: bearer tokens, the admin token of a first start, and what a request without a valid one is told.
//!
//! The credential is taken out of a request before anything else sees it ([`Auth::take`]), so nothing can log it.
//! Tokens in the query string are not read at all; EventSource, which cannot send headers, uses a ticket
//! (`http/tickets.rs`).

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, header};
use rand::RngCore;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use super::error::Problem;
use crate::config::{Role, Token};
use crate::db::Identity;

/// The user behind the admin token.
const ADMIN: &str = "admin";

/// All valid tokens, hashed.
pub struct Auth {
    tokens: Vec<([u8; 32], Identity)>,
}

pub fn hash(text: &str) -> [u8; 32] {
    Sha256::digest(text.as_bytes()).into()
}

impl Auth {
    pub fn new(tokens: &[Token], admin_token: &str) -> Auth {
        let admin = (hash(admin_token), Identity { user: Arc::from(ADMIN), role: Role::Admin, address: None });
        let others = tokens.iter().map(|token| {
            let identity = Identity { user: Arc::from(token.user.as_str()), role: token.role, address: None };
            (hash(&token.token), identity)
        });
        Auth { tokens: std::iter::once(admin).chain(others).collect() }
    }

    /// Something that changes when this identity's credentials do; `None` where it has none, or another role.
    pub fn stamp(&self, who: &Identity) -> Option<String> {
        let mut stamp = Sha256::new();
        let is_who = |identity: &Identity| identity.user == who.user && identity.role == who.role;
        let mut of_who = self.tokens.iter().filter(|(_, identity)| is_who(identity)).peekable();
        of_who.peek()?;
        of_who.for_each(|(hash, _)| stamp.update(hash));
        Some(stamp.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Removes the credential from the headers; who it belongs to, if it is valid.
    pub fn take(&self, headers: &mut HeaderMap) -> Option<Identity> {
        let credential = one_credential(headers);
        headers.remove(header::AUTHORIZATION);
        self.find(credential?.to_str().ok()?)
    }

    /// Takes the same time whichever token it is and whether it is one: all are compared, by hash.
    fn find(&self, credential: &str) -> Option<Identity> {
        let (scheme, token) = credential.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let given = hash(token.trim());
        let mut found = u64::MAX;
        for (index, (expect, _)) in self.tokens.iter().enumerate() {
            let equal: Choice = given.ct_eq(expect);
            found.conditional_assign(&(index as u64), equal);
        }
        self.tokens.get(usize::try_from(found).ok()?).map(|(_, identity)| identity.clone())
    }
}

/// Two credentials would leave open which one counts.
fn one_credential(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut all = headers.get_all(header::AUTHORIZATION).iter();
    let first = all.next()?.clone();
    all.next().is_none().then_some(first)
}

/// The same words whatever was wrong, so that nothing can be learned by trying.
pub fn unauthorized() -> Problem {
    Problem::new(401, "unauthorized", "this call needs a valid token: send the header `Authorization: Bearer <token>`")
}

/// The identity of a request that must have one.
pub struct Caller(pub Identity);

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Caller, Problem> {
        parts.extensions.get::<Identity>().cloned().map(Caller).ok_or_else(unauthorized)
    }
}

/// 256 random bits as text.
pub fn random_token() -> String {
    let mut bytes = [0; 32];
    rand::rng().fill_bytes(&mut bytes);
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The admin token where the settings have none: made at the first start, kept in the data directory.
pub struct StoredToken {
    pub token: String,
    pub path: PathBuf,
    /// Made just now: the operator has to be told where it is.
    pub new: bool,
}

/// Reads `{data_dir}/admin-token`, or makes it, readable by the owner only.
pub fn stored_admin_token(data_dir: &Path) -> io::Result<StoredToken> {
    let path = data_dir.join("admin-token");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let token = random_token();
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            file.write_all(token.as_bytes())?;
            file.sync_all()?;
            return Ok(StoredToken { token, path, new: true });
        }
        Err(error) => return Err(error),
    };
    let token = text.trim().to_owned();
    if token.len() < 32 {
        let message = "it is shorter than 32 characters; delete the file to get a new one";
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(StoredToken { token, path, new: false })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const ALICE: &str = "alice-0123456789abcdef";
    const ADMINS: &str = "admin-0123456789abcdef0123456789abcdef";

    fn auth() -> Auth {
        let token = Token { token: ALICE.to_owned(), user: "alice".to_owned(), role: Role::User };
        Auth::new(&[token], ADMINS)
    }

    fn headers(values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::AUTHORIZATION, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn tokens_name_their_users_and_leave_the_request() {
        for (given, expect) in [
            (vec![format!("Bearer {ALICE}")], Some(("alice", Role::User))),
            (vec![format!("bearer {ADMINS}")], Some(("admin", Role::Admin))),
            (vec![format!("Basic {ALICE}")], None),
            (vec![ALICE.to_owned()], None),
            (vec!["Bearer ".to_owned()], None),
            (vec![format!("Bearer {ALICE}x")], None),
            (vec![format!("Bearer {ALICE}"), format!("Bearer {ADMINS}")], None),
            (vec![], None),
        ] {
            let mut headers = headers(&given.iter().map(String::as_str).collect::<Vec<_>>());
            let found = auth().take(&mut headers);
            assert_eq!(found.as_ref().map(|who| (&*who.user, who.role)), expect, "{given:?}");
            assert!(!headers.contains_key(header::AUTHORIZATION));
        }
    }

    #[test]
    fn a_stamp_is_of_one_identity_and_its_credentials() {
        let who = |role| Identity { user: Arc::from("alice"), role, address: None };
        let stamp = auth().stamp(&who(Role::User));
        assert!(stamp.is_some());
        assert_eq!(auth().stamp(&who(Role::User)), stamp);
        assert_eq!(auth().stamp(&who(Role::Service)), None);
        let token = Token { token: format!("{ALICE}-other"), user: "alice".to_owned(), role: Role::User };
        assert_ne!(Auth::new(&[token], ADMINS).stamp(&who(Role::User)), stamp);
    }

    #[test]
    fn the_stored_token_is_made_once_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let first = stored_admin_token(dir.path()).unwrap();
        assert!(first.new && first.token.len() == 64);
        assert_eq!(fs::metadata(&first.path).unwrap().permissions().mode() & 0o777, 0o600);
        let again = stored_admin_token(dir.path()).unwrap();
        assert!(!again.new && again.token == first.token);
        fs::write(&first.path, "short").unwrap();
        assert!(stored_admin_token(dir.path()).is_err());
    }
}
