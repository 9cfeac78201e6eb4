//! Blanks comments and literals in Rust text, so that rules look at code alone.
//!
//! Not a parser: it knows just enough of the lexical grammar (nested block comments, raw strings, byte strings,
//! character literals against lifetimes). Line numbers and columns stay the same.

/// The same text with every comment, string and character literal replaced by spaces (newlines kept).
pub fn code_only(text: &str) -> String {
    let source: Vec<char> = text.chars().collect();
    let mut out: Vec<char> = Vec::with_capacity(source.len());
    let mut at = 0;
    while at < source.len() {
        let end = match source[at] {
            '/' if source.get(at + 1) == Some(&'/') => line_comment_end(&source, at),
            '/' if source.get(at + 1) == Some(&'*') => block_comment_end(&source, at),
            '"' => string_end(&source, at),
            'r' if !continues_word(&source, at) => raw_string_end(&source, at).unwrap_or(at),
            '\'' => char_end(&source, at).unwrap_or(at),
            _ => at,
        };
        if end == at {
            out.push(source[at]);
            at += 1;
        } else {
            out.extend(source[at..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
            at = end;
        }
    }
    out.into_iter().collect()
}

/// Whether `c` may be part of an identifier.
pub fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Byte offsets of `needle` in `text` where it is not part of a longer identifier.
pub fn words<'a>(text: &'a str, needle: &'a str) -> impl Iterator<Item = usize> + 'a {
    text.match_indices(needle).map(|(at, _)| at).filter(move |&at| {
        let before = text[..at].chars().next_back();
        let after = text[at + needle.len()..].chars().next();
        let opens = !needle.starts_with(is_word) || !before.is_some_and(is_word);
        let closes = !needle.ends_with(is_word) || !after.is_some_and(is_word);
        opens && closes
    })
}

/// `br"..."` starts with a `b`; any other letter before the `r` makes it part of a name.
fn continues_word(source: &[char], at: usize) -> bool {
    let Some(before) = at.checked_sub(1) else { return false };
    is_word(source[before]) && !(source[before] == 'b' && (before == 0 || !is_word(source[before - 1])))
}

fn line_comment_end(source: &[char], at: usize) -> usize {
    (at..source.len()).find(|&i| source[i] == '\n').unwrap_or(source.len())
}

fn block_comment_end(source: &[char], at: usize) -> usize {
    let mut depth = 0;
    let mut i = at;
    while i < source.len() {
        match (source[i], source.get(i + 1)) {
            ('/', Some('*')) => (depth, i) = (depth + 1, i + 2),
            ('*', Some('/')) => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            break;
        }
    }
    i.min(source.len())
}

fn string_end(source: &[char], at: usize) -> usize {
    let mut i = at + 1;
    while i < source.len() {
        match source[i] {
            '\\' => i += 2,
            '"' => return i + 1,
            _ => i += 1,
        }
    }
    source.len()
}

fn raw_string_end(source: &[char], at: usize) -> Option<usize> {
    let hashes = source[at + 1..].iter().take_while(|&&c| c == '#').count();
    let open = at + 1 + hashes;
    if source.get(open) != Some(&'"') {
        return None;
    }
    let closes = |i: usize| source[i] == '"' && source[i + 1..].iter().take_while(|&&c| c == '#').count() >= hashes;
    Some((open + 1..source.len()).find(|&i| closes(i)).map_or(source.len(), |i| i + 1 + hashes))
}

/// The end of a character literal, or `None` for a lifetime.
fn char_end(source: &[char], at: usize) -> Option<usize> {
    if source.get(at + 1) == Some(&'\\') {
        return (at + 3..source.len()).find(|&i| source[i] == '\'').map(|i| i + 1);
    }
    (source.get(at + 2) == Some(&'\'')).then_some(at + 3)
}

#[cfg(test)]
mod tests {
    use super::{code_only, words};

    #[test]
    fn comments_and_literals_vanish_and_code_stays() {
        let cases = [
            ("a // unsafe\nb", "a \nb"),
            ("a /* x /* unsafe */ y */ b", "a  b"),
            (r#"f("unsafe \" x", y)"#, "f(, y)"),
            ("let s = r#\"un\"safe\"#; t", "let s = ; t"),
            ("let s = br\"unsafe\"; t", "let s = b; t"),
            ("let c = '\"'; let d = '\\''; unsafe", "let c = ; let d = ; unsafe"),
            ("fn f<'a>(x: &'a str) {}", "fn f<'a>(x: &'a str) {}"),
            ("for r in 0..1 { bar(\"x\") }", "for r in 0..1 { bar() }"),
        ];
        let squeeze = |text: &str| text.split_whitespace().collect::<String>();
        for (given, wanted) in cases {
            let code = code_only(given);
            assert_eq!(squeeze(&code), squeeze(wanted), "{given}");
            assert_eq!(code.chars().count(), given.chars().count(), "{given}");
        }
    }

    #[test]
    fn words_are_whole() {
        let found: Vec<usize> = words("unsafe_code unsafe(unsafe) not_unsafe", "unsafe").collect();
        assert_eq!(found, [12, 19]);
    }
}
