//! The token gate before any parsing: bounds on length, nesting, chains; the allow-list of statements.
//!
//! It works on tokens because a deep syntax tree is dangerous already when it is dropped or cloned: what passes here
//! makes trees of at most a few hundred levels. It judges no grammar; that is the parser's work.

use datafusion::sql::sqlparser::keywords::{Keyword, RESERVED_FOR_COLUMN_ALIAS};
use datafusion::sql::sqlparser::tokenizer::{Token, TokenWithSpan, Tokenizer, Word};

use super::SqlError;
use super::dialect::Spoken;
use super::error::offset;

pub(crate) const MAX_TEXT: usize = 64 * 1024;
const MAX_TOKENS: usize = 20_000;
/// Brackets, CASE and sub-queries, all together.
const MAX_NESTING: usize = 50;
/// Levels a tree of operators may have: one more for every operator in a chain and for every bracket.
const MAX_CHAIN: usize = 400;
const MAX_IN_LIST: usize = 1_000;
const MAX_UNION_ARMS: usize = 16;
const MAX_JOINS: usize = 8;
const MAX_CTES: usize = 16;
const MAX_CASE_DEPTH: usize = 8;
const MAX_SUBQUERY_DEPTH: usize = 8;
const MAX_STATEMENTS: usize = 100;
/// In front of one another; a table may be called so.
const MAX_EXPLAINS: usize = 3;
/// Calls of functions whose results can be far larger than what they are given: each has a cap of its own, this
/// bounds them together.
const MAX_GROWING_CALLS: usize = 64;
const GROWING: &[&str] = &["repeat", "lpad", "rpad", "encode", "replace", "regexp_replace", "concat", "concat_ws"];
/// Clauses that a SELECT list ends at and that may have commas themselves.
const ENDS_SELECTED: &[Keyword] = &[
    Keyword::FROM,
    Keyword::WHERE,
    Keyword::GROUP,
    Keyword::HAVING,
    Keyword::ORDER,
    // Behind a SELECT that is inserted.
    Keyword::ON,
    Keyword::RETURNING,
];
const DANGLING: &str = "nothing comes behind this comma: take it away, or name what is missing (in double quotes where \
                        the name is a keyword)";
/// Up to here a tree is too small to trouble an ordinary thread's stack.
const SMALL_TOKENS: usize = 256;
/// What is small, nests no deeper and grows no higher than this may be planned on an ordinary thread as well: of all that
/// was tried within these bounds (derived tables, chains of WITH, UNION, joins, operators) nothing needed 256 KiB of
/// stack, and such threads have 2 MiB. Derived tables eight deep need more.
const SHALLOW_NESTING: usize = 4;
const SHALLOW_HEIGHT: usize = 32;

/// Text that may be parsed.
#[derive(Debug)]
pub(crate) struct Gated {
    /// Without whitespace and comments; NAMESPACE and NAMESPACES already spelled SCHEMA and SCHEMAS.
    pub(crate) tokens: Vec<TokenWithSpan>,
    /// Harmless to parse and drop on any thread.
    pub(crate) small: bool,
    /// Harmless to plan on any thread, too.
    pub(crate) shallow: bool,
    /// The highest number of a parameter; 0 where there is none.
    pub(crate) params: usize,
}

pub(crate) fn check(text: &str) -> Result<Gated, SqlError> {
    if text.len() > MAX_TEXT {
        return Err(SqlError::Limit(format!("the SQL text has {} bytes, more than {MAX_TEXT}", text.len())));
    }
    let tokens = Tokenizer::new(&Spoken, text)
        .tokenize_with_location()
        .map_err(|error| SqlError::invalid("syntax", error.message).at(offset(text, error.location)))?;
    let mut tokens: Vec<TokenWithSpan> =
        tokens.into_iter().filter(|token| !matches!(token.token, Token::Whitespace(_))).collect();
    if tokens.len() > MAX_TOKENS {
        return Err(SqlError::Limit(format!("the statement has {} tokens, more than {MAX_TOKENS}", tokens.len())));
    }
    let mut gate = Gate::default();
    let mut start = 0;
    while start < tokens.len() {
        let end = tokens[start..].iter().position(|token| token.token == Token::SemiColon);
        let end = end.map_or(tokens.len(), |length| start + length);
        if matches!(tokens[start].token, Token::EOF | Token::SemiColon) {
            start += 1;
            continue;
        }
        gate.statement(text, &mut tokens[start..end])?;
        start = end;
    }
    let small = tokens.len() <= SMALL_TOKENS;
    let shallow = small && gate.nesting <= SHALLOW_NESTING && gate.height <= SHALLOW_HEIGHT;
    let params = tokens.iter().filter_map(|token| match &token.token {
        Token::Placeholder(name) => name.strip_prefix('$')?.parse().ok(),
        _ => None,
    });
    let params = params.max().unwrap_or(0);
    Ok(Gated { tokens, small, shallow, params })
}

#[derive(Default)]
struct Gate {
    statements: usize,
    levels: Vec<Level>,
    unions: usize,
    joins: usize,
    ctes: usize,
    growing: usize,
    /// The most there was, over all statements: open levels, and levels that a tree may have.
    nesting: usize,
    height: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum LevelKind {
    Plain,
    InList,
    SubQuery,
    Case,
}

/// One open bracket or CASE, and how high the tree in it may have grown.
struct Level {
    kind: LevelKind,
    /// AND and OR since the last comma.
    logic: usize,
    /// Other operators since the last AND or OR, and the most there were before.
    term: usize,
    term_max: usize,
    /// The highest bracket of this part.
    inner: usize,
    /// The highest finished part.
    best: usize,
    items: usize,
    /// Between FROM and the next clause, where a comma is a join.
    from: bool,
    /// Between SELECT and the next clause.
    selected: bool,
}

impl Level {
    fn new(kind: LevelKind) -> Level {
        Level { kind, logic: 0, term: 0, term_max: 0, inner: 0, best: 0, items: 1, from: false, selected: false }
    }

    fn height(&self) -> usize {
        self.logic + self.term.max(self.term_max) + self.inner
    }

    /// A comma or a clause: what follows grows beside, not on top.
    fn next_part(&mut self) {
        self.best = self.best.max(self.height());
        (self.logic, self.term, self.term_max, self.inner) = (0, 0, 0, 0);
    }
}

impl Gate {
    fn statement(&mut self, text: &str, tokens: &mut [TokenWithSpan]) -> Result<(), SqlError> {
        self.statements += 1;
        if self.statements > MAX_STATEMENTS {
            return Err(SqlError::Limit(format!("more than {MAX_STATEMENTS} statements in one request")));
        }
        allow(text, tokens)?;
        (self.unions, self.joins, self.ctes) = (0, 0, 0);
        self.levels = vec![Level::new(LevelKind::Plain)];
        for at in 0..tokens.len() {
            if self.is_dangling(tokens, at) {
                let error = SqlError::invalid("syntax", DANGLING);
                return Err(error.at(offset(text, tokens[at].span.start)));
            }
            self.token(tokens, at).map_err(|message| {
                let place = offset(text, tokens[at].span.start).map_or(String::new(), |at| format!(" (at byte {at})"));
                SqlError::Limit(format!("{message}{place}"))
            })?;
        }
        Ok(())
    }

    /// A comma with nothing behind it. The parser would pass over one at the end of a SELECT list.
    fn is_dangling(&self, tokens: &[TokenWithSpan], at: usize) -> bool {
        if tokens[at].token != Token::Comma {
            return false;
        }
        match tokens.get(at + 1).map(|token| &token.token) {
            None | Some(Token::EOF | Token::RParen | Token::RBracket | Token::RBrace) => true,
            // In other lists these words may be names.
            Some(Token::Word(_)) => {
                self.top_ref().selected && RESERVED_FOR_COLUMN_ALIAS.contains(&keyword_at(tokens, at + 1))
            }
            _ => false,
        }
    }

    fn token(&mut self, tokens: &[TokenWithSpan], at: usize) -> Result<(), String> {
        match &tokens[at].token {
            Token::LParen | Token::LBracket | Token::LBrace => {
                self.growing += usize::from(at > 0 && GROWING.iter().any(|name| is_name(tokens, at - 1, name)));
                bound(self.growing, MAX_GROWING_CALLS, "calls of repeat, lpad, replace, concat and their like")?;
                self.open(bracket_kind(tokens, at))?;
            }
            Token::RParen | Token::RBracket | Token::RBrace => self.close(),
            Token::Comma => self.comma()?,
            Token::Word(word) if word.quote_style.is_none() => self.word(word, tokens, at)?,
            token if is_operand(token) => {}
            _operator => self.top().term += 1,
        }
        // The tree may be as high as all open levels together.
        let height: usize = self.levels.iter().map(Level::height).sum::<usize>() + self.levels.len();
        self.height = self.height.max(height);
        bound(height, MAX_CHAIN + MAX_NESTING, "operators in one chain")
    }

    fn open(&mut self, kind: LevelKind) -> Result<(), String> {
        self.levels.push(Level::new(kind));
        let nesting = self.levels.len() - 1;
        self.nesting = self.nesting.max(nesting);
        bound(nesting, MAX_NESTING, "levels of nesting")?;
        bound(self.count(LevelKind::SubQuery), MAX_SUBQUERY_DEPTH, "levels of sub-queries")?;
        bound(self.count(LevelKind::Case), MAX_CASE_DEPTH, "levels of CASE")
    }

    fn close(&mut self) {
        // The statement's own level stays: an unmatched bracket is the parser's to report.
        if self.levels.len() > 1
            && let Some(closed) = self.levels.pop()
        {
            let height = closed.height().max(closed.best) + 1;
            let top = self.top();
            top.inner = top.inner.max(height);
            // A subscript or call is one more level on what stands before it.
            top.term += 1;
        }
    }

    fn comma(&mut self) -> Result<(), String> {
        let top = self.top();
        top.items += 1;
        top.next_part();
        let (kind, items, from) = (top.kind, top.items, top.from);
        if from {
            self.joins += 1;
        }
        bound(self.joins, MAX_JOINS, "joins")?;
        if kind == LevelKind::InList { bound(items, MAX_IN_LIST, "values in an IN list") } else { Ok(()) }
    }

    fn word(&mut self, word: &Word, tokens: &[TokenWithSpan], at: usize) -> Result<(), String> {
        match word.keyword {
            Keyword::SELECT => self.top().selected = true,
            keyword if ENDS_SELECTED.contains(&keyword) && !is_part(tokens, at) => self.top().selected = false,
            _ => {}
        }
        match word.keyword {
            Keyword::AND | Keyword::OR | Keyword::XOR => {
                let top = self.top();
                top.logic += 1;
                top.term_max = top.term_max.max(top.term);
                top.term = 0;
            }
            Keyword::NOT
            | Keyword::IS
            | Keyword::LIKE
            | Keyword::ILIKE
            | Keyword::SIMILAR
            | Keyword::RLIKE
            | Keyword::REGEXP
            | Keyword::BETWEEN
            | Keyword::IN
            | Keyword::COLLATE
            | Keyword::AT
            | Keyword::DIV
            | Keyword::OPERATOR
            | Keyword::INTERVAL
            | Keyword::ESCAPE
            | Keyword::OVERLAPS => self.top().term += 1,
            Keyword::CASE => self.open(LevelKind::Case)?,
            Keyword::END if self.top().kind == LevelKind::Case => self.close(),
            Keyword::UNION | Keyword::INTERSECT | Keyword::EXCEPT | Keyword::MINUS if followed_by_query(tokens, at) => {
                self.unions += 1;
                self.clause(false);
                bound(self.unions + 1, MAX_UNION_ARMS, "arms of UNION, INTERSECT and EXCEPT")?;
            }
            Keyword::JOIN | Keyword::APPLY => {
                self.joins += 1;
                self.clause(true);
                bound(self.joins, MAX_JOINS, "joins")?;
            }
            Keyword::AS if opens_cte(tokens, at) => {
                self.ctes += 1;
                bound(self.ctes, MAX_CTES, "common table expressions (WITH)")?;
            }
            Keyword::FROM => self.clause(true),
            Keyword::SELECT
            | Keyword::WHERE
            | Keyword::GROUP
            | Keyword::HAVING
            | Keyword::ORDER
            | Keyword::LIMIT
            | Keyword::OFFSET
            | Keyword::QUALIFY
            | Keyword::WINDOW
            | Keyword::SET
            | Keyword::VALUES => self.clause(false),
            // After ON a comma is a join still.
            Keyword::ON | Keyword::WHEN | Keyword::THEN | Keyword::ELSE => self.clause(self.top_ref().from),
            _ => {}
        }
        Ok(())
    }

    fn clause(&mut self, from: bool) {
        let top = self.top();
        top.next_part();
        top.from = from;
    }

    fn count(&self, kind: LevelKind) -> usize {
        self.levels.iter().filter(|level| level.kind == kind).count()
    }

    fn top(&mut self) -> &mut Level {
        self.levels.last_mut().expect("the statement's own level is never closed")
    }

    fn top_ref(&self) -> &Level {
        self.levels.last().expect("the statement's own level is never closed")
    }
}

fn bound(count: usize, most: usize, what: &str) -> Result<(), String> {
    if count > most { Err(format!("more than {most} {what}")) } else { Ok(()) }
}

fn is_operand(token: &Token) -> bool {
    matches!(
        token,
        Token::EOF
            | Token::Word(_)
            | Token::Number(..)
            | Token::SingleQuotedString(_)
            | Token::DoubleQuotedString(_)
            | Token::Placeholder(_)
            | Token::HexStringLiteral(_)
            | Token::SemiColon
            | Token::DollarQuotedString(_)
            | Token::EscapedStringLiteral(_)
            | Token::NationalStringLiteral(_)
    )
}

fn keyword_at(tokens: &[TokenWithSpan], at: usize) -> Keyword {
    match tokens.get(at).map(|token| &token.token) {
        Some(Token::Word(word)) if word.quote_style.is_none() => word.keyword,
        _ => Keyword::NoKeyword,
    }
}

/// Not a clause but a name, as in `t.order` and `AS order`, or a part of WITHIN GROUP, DISTINCT ON, IS DISTINCT FROM.
fn is_part(tokens: &[TokenWithSpan], at: usize) -> bool {
    let Some(before) = at.checked_sub(1) else { return false };
    tokens[before].token == Token::Period
        || matches!(keyword_at(tokens, before), Keyword::AS | Keyword::WITHIN | Keyword::DISTINCT)
}

fn bracket_kind(tokens: &[TokenWithSpan], at: usize) -> LevelKind {
    let opens_query = matches!(
        keyword_at(tokens, at + 1),
        Keyword::SELECT | Keyword::WITH | Keyword::VALUES | Keyword::FROM | Keyword::TABLE
    );
    if tokens[at].token != Token::LParen {
        LevelKind::Plain
    } else if opens_query {
        LevelKind::SubQuery
    } else if at > 0 && keyword_at(tokens, at - 1) == Keyword::IN {
        LevelKind::InList
    } else {
        LevelKind::Plain
    }
}

/// A set operation, not `SELECT * EXCEPT (a)`.
fn followed_by_query(tokens: &[TokenWithSpan], at: usize) -> bool {
    let next = match keyword_at(tokens, at + 1) {
        Keyword::ALL | Keyword::DISTINCT | Keyword::BY => return true,
        keyword => keyword,
    };
    matches!(next, Keyword::SELECT | Keyword::VALUES | Keyword::WITH | Keyword::FROM | Keyword::TABLE)
        || matches!(
            (tokens.get(at + 1).map(|token| &token.token), keyword_at(tokens, at + 2)),
            (Some(Token::LParen), Keyword::SELECT | Keyword::VALUES | Keyword::WITH)
        )
        || tokens.get(at + 1).map(|token| &token.token) == Some(&Token::LParen)
            && tokens.get(at + 2).map(|token| &token.token) == Some(&Token::LParen)
}

/// `name AS (SELECT …`, with MATERIALIZED in between or not.
fn opens_cte(tokens: &[TokenWithSpan], at: usize) -> bool {
    let mut next = at + 1;
    while matches!(keyword_at(tokens, next), Keyword::NOT | Keyword::MATERIALIZED) {
        next += 1;
    }
    tokens.get(next).map(|token| &token.token) == Some(&Token::LParen)
}

/// The allow-list, by a statement's first words. What is not on it is refused by name and place.
fn allow(text: &str, tokens: &mut [TokenWithSpan]) -> Result<(), SqlError> {
    let second = keyword_at(tokens, 1);
    match keyword_at(tokens, 0) {
        Keyword::SELECT | Keyword::VALUES | Keyword::WITH | Keyword::FROM => return Ok(()),
        Keyword::INSERT | Keyword::UPDATE | Keyword::DELETE => return Ok(()),
        Keyword::EXPLAIN | Keyword::DESCRIBE | Keyword::DESC if explains(tokens) > MAX_EXPLAINS => {
            let error = SqlError::unsupported("EXPLAIN of EXPLAIN", Some("say EXPLAIN SELECT …"));
            return Err(error.at(offset(text, tokens[0].span.start)));
        }
        Keyword::EXPLAIN | Keyword::DESCRIBE | Keyword::DESC => return Ok(()),
        Keyword::SHOW if matches!(second, Keyword::TABLES | Keyword::COLUMNS | Keyword::SCHEMAS) => return Ok(()),
        Keyword::SHOW if is_word(tokens, 1, "namespaces") => {
            tokens[1].token = Token::make_keyword("SCHEMAS");
            return Ok(());
        }
        Keyword::ALTER if second == Keyword::TABLE => return Ok(()),
        Keyword::CREATE | Keyword::DROP if matches!(second, Keyword::TABLE | Keyword::SCHEMA | Keyword::INDEX) => {
            return Ok(());
        }
        Keyword::CREATE if second == Keyword::UNIQUE && keyword_at(tokens, 2) == Keyword::INDEX => return Ok(()),
        Keyword::CREATE | Keyword::DROP if is_word(tokens, 1, "namespace") => {
            tokens[1].token = Token::make_keyword("SCHEMA");
            return Ok(());
        }
        Keyword::NoKeyword if tokens[0].token == Token::LParen => return Ok(()),
        _ => {}
    }
    let names: Vec<String> = tokens.iter().take(3).map_while(plain_word).collect();
    let position = offset(text, tokens[0].span.start);
    let unknown = |start: &str| SqlError::invalid("syntax", format!("a statement cannot start with {start}; {STARTS}"));
    let Some(first) = names.first() else {
        return Err(unknown(&tokens[0].token.to_string()).at(position));
    };
    if keyword_at(tokens, 0) == Keyword::NoKeyword {
        return Err(unknown(first).at(position));
    }
    // CREATE OR REPLACE VIEW, ALTER INDEX, COPY: as many words as say what it is.
    let words = match first.as_str() {
        "CREATE" if names.get(1).is_some_and(|word| word == "OR") => 3,
        "CREATE" | "DROP" | "ALTER" | "SHOW" => 2,
        _ => 1,
    };
    let what = names[..words.min(names.len())].join(" ");
    Err(SqlError::unsupported(what, hint(first)).at(position))
}

/// What comes before the query that is explained may be explained in turn: each is a level for the parser.
fn explains(tokens: &[TokenWithSpan]) -> usize {
    let queries = [Keyword::SELECT, Keyword::WITH, Keyword::VALUES, Keyword::FROM, Keyword::INSERT];
    (0..tokens.len())
        .map(|at| keyword_at(tokens, at))
        .take_while(|keyword| !queries.contains(keyword))
        .filter(|keyword| matches!(keyword, Keyword::EXPLAIN | Keyword::DESCRIBE | Keyword::DESC))
        .count()
}

/// For who has misspelled the first word.
const STARTS: &str = "it starts with SELECT, WITH, VALUES, INSERT, UPDATE, DELETE, CREATE, ALTER, DROP, SHOW, DESCRIBE \
                      or EXPLAIN";

fn hint(first: &str) -> Option<&'static str> {
    match first {
        "BEGIN" | "START" | "COMMIT" | "ROLLBACK" => Some("the DML statements of one request are one transaction"),
        "COPY" => Some("the server reads and writes no files; send rows over HTTP"),
        "SET" | "RESET" => Some("settings belong to the server's configuration"),
        "TRUNCATE" => Some("use DELETE FROM"),
        "PREPARE" | "EXECUTE" => Some("send parameters ($1, $2, …) with the request"),
        _ => None,
    }
}

fn is_word(tokens: &[TokenWithSpan], at: usize, expected: &str) -> bool {
    matches!(tokens.get(at).map(|token| &token.token),
        Some(Token::Word(word)) if word.quote_style.is_none() && word.value.eq_ignore_ascii_case(expected))
}

/// Quoted or not: both call the function.
fn is_name(tokens: &[TokenWithSpan], at: usize, expected: &str) -> bool {
    matches!(tokens.get(at).map(|token| &token.token),
        Some(Token::Word(word)) if word.value.eq_ignore_ascii_case(expected))
}

fn plain_word(token: &TokenWithSpan) -> Option<String> {
    match &token.token {
        Token::Word(word) if word.quote_style.is_none() => Some(word.value.to_uppercase()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(text: &str) -> String {
        match check(text) {
            Ok(_) => "ok".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn statements_are_allowed_by_name() {
        let [hello, quoted] = ["HELLO", "'x'"].map(|start| format!("a statement cannot start with {start}; {STARTS}"));
        let cases = [
            ("SELECT 1", "ok"),
            ("  -- hello\n (SELECT 1)", "ok"),
            ("VALUES (1)", "ok"),
            ("WITH a AS (SELECT 1) SELECT * FROM a", "ok"),
            ("EXPLAIN SELECT 1; SELECT 2;;", "ok"),
            ("create namespace x", "ok"),
            ("drop schema if exists x", "ok"),
            ("", "ok"),
            (
                "COPY t TO '/etc/passwd'",
                "COPY is not supported: the server reads and writes no files; send rows over HTTP",
            ),
            ("SELECT 1; set a = 1", "SET is not supported: settings belong to the server's configuration"),
            ("CREATE EXTERNAL TABLE t STORED AS CSV LOCATION 'x'", "CREATE EXTERNAL is not supported"),
            ("CREATE OR REPLACE VIEW v AS SELECT 1", "CREATE OR REPLACE is not supported"),
            ("CREATE INDEX i ON t (a)", "ok"),
            ("create unique index on t (a); drop index if exists i", "ok"),
            ("CREATE UNIQUE VIEW v", "CREATE UNIQUE is not supported"),
            ("ALTER TABLE t ADD COLUMN a INT", "ok"),
            ("ALTER INDEX i RENAME TO j", "ALTER INDEX is not supported"),
            ("TRUNCATE t", "TRUNCATE is not supported: use DELETE FROM"),
            ("MERGE INTO t USING s ON true", "MERGE is not supported"),
            ("BEGIN", "BEGIN is not supported: the DML statements of one request are one transaction"),
            ("PREPARE p AS SELECT 1", "PREPARE is not supported: send parameters ($1, $2, …) with the request"),
            ("ATTACH DATABASE 'x' AS y", "ATTACH is not supported"),
            ("DROP FUNCTION f", "DROP FUNCTION is not supported"),
            ("SHOW ALL", "SHOW ALL is not supported"),
            ("show namespaces; SHOW COLUMNS FROM t", "ok"),
            ("hello world", hello.as_str()),
            ("'x'", quoted.as_str()),
        ];
        for (text, expected) in cases {
            assert_eq!(outcome(text), expected, "{text}");
        }
    }

    #[test]
    fn a_refusal_has_its_position() {
        let Err(SqlError::Unsupported { position, .. }) = check("SELECT 1;\n  COPY t TO 'x'") else { panic!() };
        assert_eq!(position, Some(12));
    }

    /// The parser takes them at the end of a SELECT list alone; here every list is judged alike.
    #[test]
    fn a_comma_with_nothing_behind_it_is_refused_where_it_stands() {
        for text in [
            "SELECT a, FROM t",
            "SELECT t.order, FROM t",
            "SELECT a AS b, WHERE true",
            "SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY a), FROM t",
            "SELECT a, LIMIT 1",
            "SELECT a, UNION SELECT 1",
            "SELECT DISTINCT ON (a) b, FROM t",
            "SELECT a IS DISTINCT FROM 1, FROM t",
            "SELECT a IS NOT DISTINCT FROM b, WHERE true",
            "INSERT INTO t SELECT 1, RETURNING a",
            "SELECT a,",
            "SELECT a, ; SELECT 2",
            "SELECT 1 WHERE 1 IN (SELECT b, FROM t)",
            "SELECT x FROM (SELECT 2,) AS y (x)",
            "SELECT (1, 2,)",
            "SELECT [1,]",
            "CREATE TABLE t (a INT,)",
            "INSERT INTO t (a,) VALUES (1)",
            "INSERT INTO t VALUES (1,)",
            "SELECT a FROM t ORDER BY a,",
        ] {
            let Err(SqlError::Invalid { code, message, position }) = check(text) else { panic!("{text}") };
            assert_eq!((code, message.as_str()), ("syntax", DANGLING), "{text}");
            let comma = text.rfind(", F").or_else(|| text.rfind(", W")).or_else(|| text.rfind(','));
            assert_eq!(position, comma, "{text}");
        }
        for text in [
            "SELECT a, \"from\" FROM t",
            "SELECT a, b FROM t, u ORDER BY a, offset",
            "SELECT a, b FROM t GROUP BY a, view",
            "CREATE TABLE t (a INT, end INT, from TEXT)",
            "INSERT INTO t (a, from) SELECT 1, 2",
            "INSERT INTO t SELECT 1, 2 RETURNING a, end",
            "INSERT INTO t SELECT 1, 2 ON CONFLICT (id) DO UPDATE SET a = 5, end = 6",
            "WITH a AS (SELECT 1), b AS (SELECT 2) SELECT * FROM a, b",
            "SELECT CASE WHEN a THEN 1 END, b FROM t",
        ] {
            assert_eq!(outcome(text), "ok", "{text}");
        }
    }

    #[test]
    fn bounds_hold() {
        let chain = |n: usize, op: &str| format!("SELECT a{}", format!("{op}a").repeat(n));
        let nested = |n: usize| format!("SELECT {}1{}", "(".repeat(n), ")".repeat(n));
        let list = |n: usize| format!("SELECT a IN ({})", vec!["1"; n].join(","));
        let unions = |n: usize| vec!["SELECT 1"; n].join(" UNION ALL ");
        let joins = |n: usize| format!("SELECT * FROM t{}", " JOIN t ON true".repeat(n));
        let commas = |n: usize| format!("SELECT * FROM t{}", ", t".repeat(n));
        let ctes = |n: usize| {
            let parts: Vec<String> = (0..n).map(|i| format!("c{i} AS (SELECT 1)")).collect();
            format!("WITH {} SELECT 1", parts.join(", "))
        };
        let cases = |n: usize| format!("SELECT {}1{}", "CASE WHEN a THEN ".repeat(n), " END".repeat(n));
        let queries = |n: usize| format!("SELECT {}1{}", "(SELECT ".repeat(n), ")".repeat(n));
        let good = [
            chain(400, "+"),
            chain(400, " OR a = "),
            nested(50),
            list(1000),
            unions(16),
            joins(8),
            commas(8),
            ctes(16),
            cases(8),
            queries(8),
            format!("SELECT {}", vec!["a+b"; 3000].join(",")),
            format!("INSERT INTO t VALUES {}", vec!["(1,-2.5,'x')"; 1500].join(",")),
            "SELECT a, b, c, d, e, f, g, h, i, j, k FROM t ORDER BY a, b, c, d, e, f, g, h, i, j".to_owned(),
        ];
        for text in good {
            assert_eq!(outcome(&text), "ok", "{}", &text[..60.min(text.len())]);
        }
        let bad = [
            (chain(460, "+"), "operators in one chain"),
            (chain(460, " AND "), "operators in one chain"),
            (chain(2000, " OR a = "), "operators in one chain"),
            (format!("SELECT {}a", "- ".repeat(460)), "operators in one chain"),
            (format!("SELECT {}a", "NOT ".repeat(460)), "operators in one chain"),
            (format!("SELECT a{}", "::int".repeat(460)), "operators in one chain"),
            (format!("SELECT a{}", "[1]".repeat(460)), "operators in one chain"),
            (format!("SELECT * FROM a JOIN b ON true{}", ", t".repeat(9)), "joins"),
            (
                format!("SELECT {}1{}", format!("({}", "1+".repeat(100)).repeat(10), ")".repeat(10)),
                "operators in one chain",
            ),
            (nested(51), "levels of nesting"),
            (list(1001), "values in an IN list"),
            (unions(17), "arms of UNION"),
            (joins(9), "joins"),
            (commas(9), "joins"),
            (ctes(17), "common table expressions"),
            (cases(9), "levels of CASE"),
            (queries(9), "levels of sub-queries"),
            (format!("{}SELECT 1", "EXPLAIN ".repeat(100)), "EXPLAIN of EXPLAIN"),
            (format!("SELECT 1; {}t", "DESCRIBE ".repeat(7000)), "EXPLAIN of EXPLAIN"),
            (format!("EXPLAIN {}SELECT 1", "ANALYZE VERBOSE DESC ".repeat(4)), "EXPLAIN of EXPLAIN"),
            ("SELECT 1;".repeat(101), "more than 100 statements"),
            (format!("SELECT {}", vec!["\"repeat\"('x', 9)"; 65].join(",")), "calls of repeat"),
            (format!("SELECT {}", "1,".repeat(12_000)), "tokens"),
            (format!("SELECT '{}'", "x".repeat(MAX_TEXT)), "bytes"),
        ];
        for (text, expected) in bad {
            let outcome = outcome(&text);
            assert!(outcome.contains(expected), "{}: {outcome}", &text[..60.min(text.len())]);
        }
    }

    #[test]
    fn what_may_be_planned_anywhere_is_told_from_what_may_not() {
        let deep = |levels: usize| format!("SELECT {}a{} FROM t", "abs(".repeat(levels), ")".repeat(levels));
        let chain = |operators: usize| format!("SELECT a FROM t WHERE a = 1{}", " OR a = 1".repeat(operators));
        for (text, shallow) in [
            ("SELECT id, v FROM t WHERE room = 'a' AND v BETWEEN 1 AND 9".to_owned(), true),
            ("SELECT room, count(*) AS n FROM t GROUP BY room ORDER BY n LIMIT 3".to_owned(), true),
            (deep(4), true),
            (deep(5), false),
            (chain(20), true),
            (chain(40), false),
            (format!("SELECT 1; {}; SELECT 2", deep(5)), false),
            (format!("SELECT {}", vec!["a"; 120].join(", ")), true),
            (format!("SELECT {}", vec!["a"; 130].join(", ")), false),
        ] {
            assert_eq!(check(&text).unwrap().shallow, shallow, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_judged_without_panic(text in "[a-z()\\[\\],;+$?'\" \n.]{0,200}") {
            let _ = check(&text);
        }
    }
}
