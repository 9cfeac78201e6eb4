//! Names that people give to things.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Longest name in bytes.
pub const NAME_BYTES_MAX: usize = 63;

/// The name of a node, pool, volume, host, rack or zone: 1 to 63 of `a-z A-Z 0-9 . _ -`, not starting with `-` (an option) or `.`
/// (a hidden file). Always valid: built by parsing only, also when it comes from disk.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Name(String);

/// A text that is no name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// Empty or too long.
    #[error("a name has 1 to {NAME_BYTES_MAX} characters")]
    Length,
    /// A character outside the set.
    #[error("a name has only letters, digits, '.', '_' and '-', not {0:?}")]
    Character(char),
    /// The first character is `-` or `.`.
    #[error("a name does not start with {0:?}")]
    Start(char),
}

impl Name {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        text.to_owned().try_into()
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if let Some(wrong) = text.chars().find(|c| !allowed(*c)) {
            return Err(NameError::Character(wrong));
        }
        match text.chars().next() {
            None => Err(NameError::Length),
            Some(first @ ('-' | '.')) => Err(NameError::Start(first)),
            Some(_) if text.len() > NAME_BYTES_MAX => Err(NameError::Length),
            Some(_) => Ok(Self(text)),
        }
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::borrow::Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_on_a_command_line_and_in_a_path() {
        for good in ["vm1", "a", "A-b_c.9", "0", "_x", &"n".repeat(63)] {
            assert_eq!(good.parse::<Name>().map(|name| name.to_string()), Ok(good.to_owned()));
        }
        let refused = |text: &str| text.parse::<Name>().unwrap_err();
        assert_eq!(refused(""), NameError::Length);
        assert_eq!(refused(&"n".repeat(64)), NameError::Length);
        assert_eq!(refused("-rf"), NameError::Start('-'));
        assert_eq!(refused(".."), NameError::Start('.'));
        for wrong in ["a/b", "a b", "ü", "a\0", "a\n"] {
            assert!(matches!(refused(wrong), NameError::Character(_)), "{wrong:?}");
        }
    }
}
