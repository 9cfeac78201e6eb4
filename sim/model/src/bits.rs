//! A small set of small numbers, kept in one word so that states stay small.

use std::fmt;
use std::ops::{BitAnd, BitOr, BitOrAssign, Sub, SubAssign};

/// A set of numbers below 16: records, segments, nodes or members.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Bits(u16);

impl Bits {
    /// The empty set.
    pub const NONE: Self = Self(0);

    /// The set of one number.
    pub fn one(number: u8) -> Self {
        debug_assert!(number < 16, "{number} does not fit");
        Self(1 << number)
    }

    /// The numbers below `count`.
    pub fn below(count: u8) -> Self {
        debug_assert!(count < 16, "{count} do not fit");
        Self((1 << count) - 1)
    }

    /// Adds a number.
    pub fn add(&mut self, number: u8) {
        *self |= Self::one(number);
    }

    /// Takes a number out.
    pub fn remove(&mut self, number: u8) {
        *self -= Self::one(number);
    }

    /// Whether the number is in it.
    pub fn has(self, number: u8) -> bool {
        self.0 & (1 << number) != 0
    }

    /// Whether all of `other` is in it.
    pub fn covers(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }

    /// Whether it has nothing in it.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many numbers are in it.
    pub fn count(self) -> u32 {
        self.0.count_ones()
    }

    /// Its numbers, smallest first.
    pub fn iter(self) -> impl Iterator<Item = u8> {
        let mut left = self.0;
        std::iter::from_fn(move || {
            let lowest = left.trailing_zeros();
            left &= left.wrapping_sub(1);
            u8::try_from(lowest).ok().filter(|lowest| *lowest < 16)
        })
    }

    /// Its greatest number alone.
    pub fn last(self) -> Self {
        self.iter().last().map_or(Self::NONE, Self::one)
    }
}

impl FromIterator<u8> for Bits {
    fn from_iter<I: IntoIterator<Item = u8>>(numbers: I) -> Self {
        numbers.into_iter().fold(Self::NONE, |all, number| all | Self::one(number))
    }
}

impl BitOr for Bits {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for Bits {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl BitAnd for Bits {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// What is in the one and not in the other.
impl Sub for Bits {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl SubAssign for Bits {
    fn sub_assign(&mut self, other: Self) {
        self.0 &= !other.0;
    }
}

impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<String> = self.iter().map(|number| number.to_string()).collect();
        write!(f, "{{{}}}", numbers.join(" "))
    }
}

impl fmt::Debug for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::Bits;

    #[test]
    fn a_set_is_what_was_put_in() {
        let set: Bits = [1, 4, 15].into_iter().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), [1, 4, 15]);
        assert_eq!(set.last(), Bits::one(15));
        assert!((set | Bits::below(3)).covers(Bits::below(3)));
        assert_eq!((set - Bits::one(4)).to_string(), "{1 15}");
        assert!(Bits::NONE.is_empty() && Bits::NONE.last().is_empty());
    }
}
