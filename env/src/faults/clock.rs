//! A host's clocks, told from the machine's.

/// One million: rates are told in millionths.
const UNIT: i128 = 1_000_000;

/// How a host's clocks differ from the machine's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Setting {
    /// Of the steady clock.
    pub(super) offset_millis: i64,
    /// How much faster than real time, in millionths.
    pub(super) rate: i64,
    /// Of the wall clock.
    pub(super) wall_millis: i64,
}

impl Setting {
    /// `offset rate wall`; what is missing is 0.
    pub(super) fn parse(text: &str) -> Self {
        let mut numbers = text.split_whitespace().map(|word| word.parse().unwrap_or(0));
        let mut next = || numbers.next().unwrap_or(0);
        Self { offset_millis: next(), rate: next().clamp(-900_000, 9_000_000), wall_millis: next() }
    }

    fn shown_span(&self, real: u64) -> u64 {
        u64::try_from(i128::from(real) * (UNIT + i128::from(self.rate)) / UNIT).unwrap_or(u64::MAX)
    }

    pub(super) fn real_span(&self, shown: u64) -> u64 {
        u64::try_from(i128::from(shown) * UNIT / (UNIT + i128::from(self.rate))).unwrap_or(u64::MAX)
    }
}

/// The steady clock: goes on from what it showed when its setting changes.
pub(super) struct Clock {
    setting: Setting,
    /// What it showed at which real ns; `None` before the first look.
    anchor: Option<(u64, u64)>,
}

impl Clock {
    pub(super) fn new(setting: Setting) -> Self {
        Self { setting, anchor: None }
    }

    /// What it shows at the real time `real`, and from now on by `setting`.
    pub(super) fn now(&mut self, real: u64, setting: Setting) -> u64 {
        let (base, shown) = *self.anchor.get_or_insert_with(|| {
            (real, real.saturating_add_signed(self.setting.offset_millis.saturating_mul(1_000_000)))
        });
        let now = shown + self.setting.shown_span(real.saturating_sub(base));
        if setting == self.setting {
            return now;
        }
        let jump = setting.offset_millis.saturating_sub(self.setting.offset_millis).max(0).cast_unsigned();
        let now = now + jump * 1_000_000;
        (self.setting, self.anchor) = (setting, Some((real.max(base), now)));
        now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_runs_at_its_rate_jumps_forward_and_never_goes_back() {
        let fast = Setting::parse("5000 10000 -7");
        assert_eq!(fast, Setting { offset_millis: 5000, rate: 10_000, wall_millis: -7 });
        let mut clock = Clock::new(fast);
        assert_eq!(clock.now(1_000_000_000, fast), 6_000_000_000);
        assert_eq!(clock.now(2_000_000_000, fast), 7_010_000_000);
        assert_eq!(fast.real_span(1_010_000_000), 1_000_000_000);
        let slow = Setting::parse("6000 -500000");
        assert_eq!(clock.now(2_000_000_000, slow), 8_010_000_000, "a second more");
        assert_eq!(clock.now(4_000_000_000, slow), 9_010_000_000, "at half the pace");
        assert_eq!(clock.now(4_000_000_000, Setting::default()), 9_010_000_000, "an offset is never taken back");
        assert_eq!(clock.now(3_000_000_000, Setting::default()), 9_010_000_000);
    }
}
