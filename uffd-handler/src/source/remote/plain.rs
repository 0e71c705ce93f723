//! What an object store's client says of a failure, in words that may be logged and shown to a guest's owner. Pure.
//!
//! An answer may say anything, and S3's own repeat the request, with the session token in it: so the body of an answer is left
//! out, but for the code of the error.

use std::error::Error;

/// Longest text, in characters.
const LONGEST: usize = 200;

/// The reason at the bottom of an error, in one line.
pub fn reason(error: &dyn Error) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    line(&deepest.to_string())
}

/// The beginning of a text, up to where a document begins in it, and the error code in that.
fn line(text: &str) -> String {
    let (head, body) = text.split_at(text.find(['<', '{', '\n', '\r']).unwrap_or(text.len()));
    // The text of an answer need not look like a document.
    let head = match head.split_once("status code: ") {
        Some((before, after)) => {
            let status = after.split_once(": ").map_or(after, |(status, _)| status);
            format!("{before}status code: {status}")
        }
        None => head.to_owned(),
    };
    let head: String = head.chars().filter(|c| !c.is_control()).take(LONGEST).collect();
    let head = head.trim_end_matches([':', ' ']);
    match code(body) {
        Some(code) => format!("{head} ({code})"),
        None => head.to_owned(),
    }
}

/// What stands between `<Code>` and `</Code>`, if that is a word.
fn code(body: &str) -> Option<&str> {
    let (_, rest) = body.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    let is_word = (1..=64).contains(&code.len()) && code.bytes().all(|b| b.is_ascii_alphanumeric());
    is_word.then_some(code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn of_an_answer_only_the_status_and_the_code_are_told() {
        let text = "Server returned 403 Forbidden: <?xml?><Error><Code>AccessDenied</Code><Token>hush</Token></Error>";
        assert_eq!(line(text), "Server returned 403 Forbidden (AccessDenied)");
        assert_eq!(line("Server returned 500: \n hush"), "Server returned 500");
        let text = "Server returned non-2xx status code: 403 Forbidden: token hush is not valid";
        assert_eq!(line(text), "Server returned non-2xx status code: 403 Forbidden");
        assert_eq!(line("Server returned 500: <Code>two words</Code>"), "Server returned 500");
        assert_eq!(line("Connection refused (os error 111)"), "Connection refused (os error 111)");
    }

    #[test]
    fn the_deepest_reason_is_told() {
        let inner = std::io::Error::other("no route to host");
        let outer = object_store::Error::Generic { store: "S3", source: Box::new(std::io::Error::other(inner)) };
        assert_eq!(reason(&outer), "no route to host");
    }

    proptest! {
        #[test]
        fn any_text_becomes_one_short_line(text in any::<String>()) {
            let line = line(&text);
            prop_assert!(line.chars().count() <= LONGEST + 70);
            prop_assert!(!line.chars().any(char::is_control));
        }
    }
}
