//! Redundancy schemes: `rs(k,m)` and `replica(n)`.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Largest number of shards of a scheme (k + m, or n).
pub const SHARDS_MAX: u8 = 64;

/// How a pool's segments are made redundant. Always valid: built through [`Scheme::rs`] and [`Scheme::replica`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Scheme(Inner);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Inner {
    Rs { k: u8, m: u8 },
    Replica { n: u8 },
}

/// Why a scheme was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SchemeError {
    /// Not of the form `K+M`, `rs(K,M)` or `replica(N)`.
    #[error("not a scheme; write K+M (for example 4+2) or replica(N) (for example replica(3))")]
    Form,
    /// A number outside its bounds.
    #[error("a scheme needs k >= 1, m >= 1 and k+m <= {SHARDS_MAX}; or 1 <= n <= {SHARDS_MAX} replicas")]
    Bounds,
}

impl Scheme {
    /// Reed-Solomon with `k` data and `m` parity shards.
    ///
    /// # Errors
    /// [`SchemeError::Bounds`] unless k >= 1, m >= 1 and k + m <= 64.
    pub fn rs(k: u8, m: u8) -> Result<Self, SchemeError> {
        match k.checked_add(m) {
            Some(sum) if k >= 1 && m >= 1 && sum <= SHARDS_MAX => Ok(Self(Inner::Rs { k, m })),
            _ => Err(SchemeError::Bounds),
        }
    }

    /// `n` whole copies.
    ///
    /// # Errors
    /// [`SchemeError::Bounds`] unless 1 <= n <= 64.
    pub fn replica(n: u8) -> Result<Self, SchemeError> {
        if (1..=SHARDS_MAX).contains(&n) { Ok(Self(Inner::Replica { n })) } else { Err(SchemeError::Bounds) }
    }

    /// Shards needed to give the bytes back: k, or 1 for replicas.
    #[must_use]
    pub fn k(self) -> usize {
        match self.0 {
            Inner::Rs { k, .. } => k.into(),
            Inner::Replica { .. } => 1,
        }
    }

    /// Lost failure domains tolerated: m, or n - 1. The journal set has this plus one members (P3).
    #[must_use]
    pub fn tolerates(self) -> usize {
        match self.0 {
            Inner::Rs { m, .. } => m.into(),
            Inner::Replica { n } => usize::from(n) - 1,
        }
    }

    /// All positions of a placement group: k + m, or n.
    #[must_use]
    pub fn width(self) -> usize {
        self.k() + self.tolerates()
    }

    /// Whether this is `replica(n)`.
    #[must_use]
    pub fn is_replica(self) -> bool {
        matches!(self.0, Inner::Replica { .. })
    }

    /// Device bytes per user byte once sealed: 1.5 for 4+2.
    #[must_use]
    pub fn overhead(self) -> f64 {
        self.width() as f64 / self.k() as f64
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Inner::Rs { k, m } => write!(f, "rs({k},{m})"),
            Inner::Replica { n } => write!(f, "replica({n})"),
        }
    }
}

impl FromStr for Scheme {
    type Err = SchemeError;

    fn from_str(text: &str) -> Result<Self, SchemeError> {
        let text = text.trim();
        let number = |part: &str| part.trim().parse::<u8>().map_err(|_| SchemeError::Form);
        let inside = |word: &str| text.strip_prefix(word).and_then(|rest| rest.strip_suffix(')'));
        if let Some(n) = inside("replica(") {
            return Self::replica(number(n)?);
        }
        let (k, m) = match inside("rs(") {
            Some(pair) => pair.split_once(','),
            None => text.split_once('+'),
        }
        .ok_or(SchemeError::Form)?;
        Self::rs(number(k)?, number(m)?)
    }
}

impl From<Scheme> for String {
    fn from(scheme: Scheme) -> String {
        scheme.to_string()
    }
}

impl TryFrom<String> for Scheme {
    type Error = SchemeError;
    fn try_from(text: String) -> Result<Self, SchemeError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemes_are_read_as_users_write_them() {
        assert_eq!("4+2".parse(), Scheme::rs(4, 2));
        assert_eq!("rs(8, 3)".parse(), Scheme::rs(8, 3));
        assert_eq!("replica(3)".parse(), Scheme::replica(3));
        for wrong in ["", "4", "4+", "+2", "4+2+1", "replica(x)", "rs(4)", "-1+2"] {
            assert_eq!(wrong.parse::<Scheme>(), Err(SchemeError::Form), "{wrong}");
        }
        for wrong in ["0+2", "4+0", "60+5", "200+100", "replica(0)", "replica(65)"] {
            assert_eq!(wrong.parse::<Scheme>(), Err(SchemeError::Bounds), "{wrong}");
        }
    }

    #[test]
    fn widths_follow_the_scheme() {
        let rs = Scheme::rs(4, 2).unwrap();
        assert_eq!((rs.k(), rs.tolerates(), rs.width()), (4, 2, 6));
        let replica = Scheme::replica(3).unwrap();
        assert_eq!((replica.k(), replica.tolerates(), replica.width()), (1, 2, 3));
        assert_eq!(rs.to_string().parse(), Ok(rs));
    }
}
