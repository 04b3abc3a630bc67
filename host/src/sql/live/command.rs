//! The two statements about live queries, which no SQL parser knows: `EXPLAIN LIVE SELECT …` and
//! `KILL LIVE QUERY 'id'`.

use datafusion::sql::sqlparser::tokenizer::{Token, TokenWithSpan, Tokenizer};

use crate::sql::SqlError;
use crate::sql::dialect::Spoken;
use crate::sql::error::offset;
use crate::sql::gate::MAX_TEXT;

#[derive(Debug, PartialEq, Eq)]
pub enum LiveCommand {
    /// The query, with spaces where the words before it stood: positions stay right.
    Explain(String),
    /// By `live_id`.
    Kill(String),
}

/// What the text says, if it is one of these.
pub fn command(text: &str) -> Result<Option<LiveCommand>, SqlError> {
    // Whatever else there is, the gate looks at it.
    if text.len() > MAX_TEXT {
        return Ok(None);
    }
    // Every statement comes by here, and hardly any is one of the two.
    if !text.as_bytes().windows(4).any(|word| word.eq_ignore_ascii_case(b"live")) {
        return Ok(None);
    }
    let Ok(tokens) = Tokenizer::new(&Spoken, text).tokenize_with_location() else { return Ok(None) };
    let mut tokens = tokens.into_iter().filter(|token| !matches!(token.token, Token::Whitespace(_)));
    let (Some(first), Some(second)) = (tokens.next(), tokens.next()) else { return Ok(None) };
    if !is(&second, "LIVE") {
        return Ok(None);
    }
    if is(&first, "EXPLAIN") {
        let Some(end) = offset(text, second.span.end) else { return Ok(None) };
        return Ok(Some(LiveCommand::Explain(format!("{}{}", " ".repeat(end), &text[end..]))));
    }
    if !is(&first, "KILL") {
        return Ok(None);
    }
    let said = |at: Option<TokenWithSpan>| {
        let at = at.and_then(|token| offset(text, token.span.start));
        SqlError::invalid("syntax", "say KILL LIVE QUERY 'id', with a live_id of system.live_queries").at(at)
    };
    match tokens.next() {
        Some(word) if is(&word, "QUERY") => {}
        other => return Err(said(other)),
    }
    let id = match tokens.next() {
        Some(TokenWithSpan { token: Token::SingleQuotedString(id), .. }) => id,
        other => return Err(said(other)),
    };
    match tokens.find(|token| !matches!(token.token, Token::SemiColon | Token::EOF)) {
        None => Ok(Some(LiveCommand::Kill(id))),
        other => Err(said(other)),
    }
}

fn is(token: &TokenWithSpan, wanted: &str) -> bool {
    matches!(&token.token, Token::Word(word) if word.quote_style.is_none() && word.value.eq_ignore_ascii_case(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_these_two() {
        let kill = |id: &str| Ok(Some(LiveCommand::Kill(id.to_owned())));
        let show = |text: &str| command(text).map_err(|error| error.to_string());
        assert_eq!(show("KILL LIVE QUERY 'ab'"), kill("ab"));
        assert_eq!(show(" -- why\nkill live query 'a''b' ;"), kill("a'b"));
        assert_eq!(show("explain LIVE SELECT 1"), Ok(Some(LiveCommand::Explain("             SELECT 1".to_owned()))));
        for other in ["SELECT 1", "EXPLAIN SELECT 1", "KILL 5", "", "EXPLAIN \"LIVE\"", "'"] {
            assert_eq!(show(other), Ok(None), "{other}");
        }
        for wrong in ["KILL LIVE", "KILL LIVE QUERY", "KILL LIVE QUERY ab", "KILL LIVE QUERY 'a'; SELECT 1"] {
            assert!(show(wrong).unwrap_err().contains("say KILL LIVE QUERY"), "{wrong}");
        }
    }
}
