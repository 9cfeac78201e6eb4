//! Waiting on conditions, always with a bound.

use std::future::Future;
use std::time::{Duration, Instant};

/// Between two looks at a condition.
const PAUSE: Duration = Duration::from_millis(20);

/// Waits until `holds` says so.
///
/// # Panics
/// It did not within `seconds`; the text says what was waited for and what `holds` last saw.
pub fn eventually(seconds: u64, what: &str, mut holds: impl FnMut() -> Result<(), String>) {
    let end = Instant::now() + Duration::from_secs(seconds);
    loop {
        match holds() {
            Ok(()) => return,
            Err(seen) => assert!(Instant::now() < end, "{what}: not within {seconds} s; last seen: {seen}"),
        }
        // tidy-allow(sleep): the pause between two looks at a condition of another process
        std::thread::sleep(PAUSE);
    }
}

/// Runs a future that must end within `seconds`.
///
/// # Panics
/// It did not.
pub async fn within<T>(seconds: u64, what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(Duration::from_secs(seconds), future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: not within {seconds} s"),
    }
}
