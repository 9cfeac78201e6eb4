//! Rules that can be taken out, to see that they are needed.

use crate::check::{Model, Report, search};
use std::fmt;
use std::marker::PhantomData;

/// The rules of one model.
pub trait Rule: Copy + PartialEq + fmt::Debug + 'static {
    /// All of them, in the order of the protocol.
    const ALL: &'static [Self];

    /// What it is called on the command line.
    fn name(self) -> &'static str;

    /// Where it comes from and what it says, in one line.
    fn says(self) -> &'static str;

    /// Its place in [`Rule::ALL`].
    fn place(self) -> u32;
}

/// The rules that hold; all of them unless some were taken out.
pub struct Rules<R> {
    out: u64,
    of: PhantomData<R>,
}

impl<R> Clone for Rules<R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R> Copy for Rules<R> {}

impl<R: Rule> Rules<R> {
    /// Every rule holds.
    pub fn all() -> Self {
        Self { out: 0, of: PhantomData }
    }

    /// The same, with one more taken out.
    #[must_use]
    pub fn without(self, rule: R) -> Self {
        Self { out: self.out | 1 << rule.place(), of: PhantomData }
    }

    /// Whether the rule holds.
    pub fn hold(self, rule: R) -> bool {
        self.out & 1 << rule.place() == 0
    }
}

/// A model whose rules can be taken out and whose bounds are given in words.
pub trait Ruled: Model + Sized {
    /// Its rules.
    type Rule: Rule;

    /// What it is called on the command line.
    const NAME: &'static str;

    /// What the words for its bounds mean.
    const WORDS: &'static str;

    /// Bounds within which it breaks a promise without a rule, and none with all of them. Every rule is here.
    const NEEDED: &'static [(Self::Rule, &'static str)];

    /// The model within these bounds.
    ///
    /// # Errors
    /// A word that it does not know.
    fn build(words: &[&str], rules: Rules<Self::Rule>) -> Result<Self, String>;
}

/// What became of a promise without a rule, and with it.
#[derive(Debug)]
pub struct Verdict<R> {
    /// The rule.
    pub rule: R,
    /// The bounds.
    pub words: &'static str,
    /// The search without it.
    pub without: Report,
    /// The search with all rules.
    pub with: Report,
}

impl<R> Verdict<R> {
    /// Whether the promise was broken without the rule, and holds with it in every state.
    pub fn is_needed(&self) -> bool {
        self.without.story().is_some() && self.with.is_clean()
    }
}

/// Searches the bounds of [`Ruled::NEEDED`] without the rule and with it.
///
/// # Errors
/// A word of its bounds that the model does not know.
pub fn judge<M: Ruled>(rule: M::Rule, words: &'static str, states_max: usize) -> Result<Verdict<M::Rule>, String> {
    let split: Vec<&str> = words.split_whitespace().collect();
    let without = M::build(&split, Rules::all().without(rule))?;
    let with = M::build(&split, Rules::all())?;
    Ok(Verdict { rule, words, without: search(&without, states_max), with: search(&with, states_max) })
}

/// Reads words such as `w=2` or `reads` (which is `reads=1`) and gives each to `put`, which answers `None` if it knows no such
/// word or not that number.
///
/// # Errors
/// The word that was not taken.
pub fn read_words(words: &[&str], mut put: impl FnMut(&str, u8) -> Option<()>) -> Result<(), String> {
    for word in words {
        let (name, number) = word.split_once('=').unwrap_or((word, "1"));
        let number = number.parse().map_err(|_| format!("`{word}`: not a small number"))?;
        put(name, number).ok_or_else(|| format!("`{word}`: not a bound of this model"))?;
    }
    Ok(())
}

/// Makes an enum of rules; each has its name and a line that says it.
macro_rules! rules {
    ($(#[$about:meta])* $name:ident { $($rule:ident = $word:literal, $says:literal;)+ }) => {
        $(#[$about])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u8)]
        pub enum $name {
            $(#[doc = $says] $rule,)+
        }

        impl $crate::rules::Rule for $name {
            const ALL: &'static [Self] = &[$(Self::$rule,)+];

            fn name(self) -> &'static str {
                match self { $(Self::$rule => $word,)+ }
            }

            fn says(self) -> &'static str {
                match self { $(Self::$rule => $says,)+ }
            }

            fn place(self) -> u32 {
                self as u32
            }
        }
    };
}
pub(crate) use rules;
