//! Histories made by hand; [`generated`] ones are compared with a search through all orders.

use super::*;

mod generated;

const BLOCK: u64 = 5;

fn wrote(client: u64, value: u64, start: u64, end: u64) -> Operation {
    Operation { client, block: BLOCK, kind: Kind::Write, value, start, end: Some(end) }
}

fn tried(client: u64, value: u64, start: u64) -> Operation {
    Operation { client, block: BLOCK, kind: Kind::Write, value, start, end: None }
}

fn read(client: u64, value: u64, start: u64, end: u64) -> Operation {
    Operation { client, block: BLOCK, kind: Kind::Read, value, start, end: Some(end) }
}

fn checked(operations: &[Operation]) -> Result<Report, Violation> {
    check(&History { operations: operations.to_vec(), ..History::new() })
}

fn legal(operations: &[Operation]) {
    if let Err(violation) = checked(operations) {
        panic!("{violation}");
    }
}

/// Expects a violation of these operations and no others, told so.
#[track_caller]
fn wrong(what: &str, contradiction: &[Operation], beside: &[Operation]) {
    let violation = checked(&[contradiction, beside].concat()).expect_err(what);
    let text = violation.to_string();
    assert!(text.contains(what), "{text}");
    assert_eq!(violation.operations, contradiction, "{text}");
}

#[test]
fn what_one_disk_can_show_is_legal() {
    legal(&[]);
    legal(&[read(1, 0, 0, 1), wrote(1, 7, 2, 3), read(2, 7, 4, 5), wrote(2, 8, 6, 7), read(1, 8, 8, 9)]);
    // Of two writes at once either may win, and a read at the same time may see the other one before.
    legal(&[wrote(1, 7, 0, 10), wrote(2, 8, 0, 10), read(3, 7, 0, 10), read(3, 8, 11, 12)]);
    legal(&[wrote(1, 7, 0, 10), wrote(2, 8, 0, 10), read(3, 8, 0, 10), read(3, 7, 11, 12)]);
    // A write is seen before it is acknowledged.
    legal(&[wrote(1, 7, 0, 100), read(2, 0, 1, 2), read(2, 7, 3, 4), read(3, 7, 5, 6)]);
    // What ends when the other starts may have been at the same time.
    legal(&[wrote(1, 7, 0, 5), read(2, 0, 5, 6), read(2, 7, 6, 7)]);
    // Three values within one moment that all share.
    legal(&[wrote(1, 7, 0, 5), wrote(2, 8, 5, 5), read(3, 7, 5, 9), wrote(1, 9, 5, 9), read(2, 9, 9, 9)]);
}

#[test]
fn a_stale_read_is_told_with_what_it_missed() {
    let stale = [wrote(0, 17, 0, 1), wrote(1, 21, 2, 3), read(3, 17, 4, 5)];
    let beside = [wrote(4, 30, 6, 7), read(4, 30, 8, 9), read(4, 0, 0, 0)];
    wrong("client 3 read 17 [0.000000004..0.000000005 s]: a stale read, or the loss of 21", &stale, &beside);
}

#[test]
fn a_lost_write_is_told() {
    wrong("nobody wrote zeroes after client 1 wrote 21", &[wrote(1, 21, 2, 3), read(3, 0, 4, 5)], &[]);
    // After all processes were killed, an older value is back.
    let lost = [wrote(0, 17, 0, 10), wrote(1, 21, 20, 30), read(3, 17, 1000, 1001)];
    wrong("the loss of 21", &lost, &[read(2, 21, 31, 32), read(2, 17, 11, 12)]);
}

#[test]
fn a_value_from_nowhere_is_told_with_its_right_place() {
    wrong("which nobody wrote to it", &[read(3, 99, 4, 5)], &[wrote(1, 21, 2, 3)]);
    let elsewhere = Operation { block: 8, ..wrote(1, 99, 0, 1) };
    wrong("block 8 got it: client 1 wrote 99", &[read(3, 99, 4, 5)], &[elsewhere]);
}

#[test]
fn a_value_from_the_future_is_told() {
    wrong("before client 1 began to write it", &[read(3, 21, 0, 1), wrote(1, 21, 2, 3)], &[read(1, 21, 4, 5)]);
}

#[test]
fn two_readers_see_one_order() {
    let writes = [wrote(1, 7, 0, 100), wrote(2, 8, 0, 100)];
    let first = [read(3, 7, 10, 11), read(3, 8, 20, 21)];
    legal(&[&writes[..], &first, &[read(4, 7, 12, 13), read(4, 8, 14, 15)]].concat());
    let violation = checked(&[&writes[..], &first, &[read(4, 8, 10, 11), read(4, 7, 20, 21)]].concat());
    assert_eq!(violation.expect_err("two orders").operations.len(), 6);
}

#[test]
fn a_write_that_failed_may_show_up_late_but_not_come_and_go() {
    let late = [tried(1, 7, 0), read(2, 0, 1, 2), wrote(2, 8, 3, 4), read(2, 8, 5, 6), read(2, 7, 50, 51)];
    let report = checked(&late).expect("it may");
    assert_eq!(report, Report { blocks: 1, reads: 3, writes: 2, zeroes: 0, unknown: 1, appeared: 1 });
    legal(&[tried(1, 7, 0), tried(1, 8, 1), read(2, 0, 90, 91)]);
    wrong(
        "nobody wrote zeroes after client 2 read 7",
        &[tried(1, 7, 0), read(2, 7, 1, 2), read(3, 0, 3, 4)],
        &[tried(1, 8, 0)],
    );
    let again = [tried(1, 7, 0), read(2, 7, 1, 2), wrote(2, 8, 3, 4), read(3, 7, 7, 8)];
    wrong("the loss of 8", &again, &[read(3, 8, 5, 6)]);
    wrong("before client 1 began", &[read(2, 7, 1, 2), tried(1, 7, 3)], &[]);
}

#[test]
fn zeroes_may_be_written_again_and_again() {
    legal(&[
        wrote(1, 7, 0, 1),
        wrote(2, 0, 2, 3),
        read(3, 0, 4, 5),
        wrote(1, 8, 6, 7),
        wrote(2, 0, 6, 9),
        read(3, 0, 10, 11),
    ]);
    // A trim that failed comes late, after one that was acknowledged was overwritten.
    legal(&[
        tried(1, 0, 0),
        wrote(2, 0, 1, 2),
        wrote(2, 7, 3, 4),
        read(3, 7, 5, 6),
        read(3, 0, 7, 8),
        read(3, 0, 9, 10),
    ]);
    // The trim is before the write or after it, whichever the reader saw.
    legal(&[wrote(1, 7, 0, 10), wrote(2, 0, 0, 10), read(3, 7, 11, 12)]);
    legal(&[wrote(1, 7, 0, 10), wrote(2, 0, 0, 10), read(3, 0, 11, 12)]);
}

#[test]
fn what_a_trim_did_is_not_undone_or_done_twice() {
    let undone = [wrote(1, 7, 0, 1), wrote(2, 0, 2, 3), read(3, 7, 4, 5)];
    wrong("the loss of zeroes", &undone, &[]);
    let unwritten = [wrote(1, 7, 2, 3), read(3, 0, 4, 5)];
    wrong("nobody wrote zeroes after client 1 wrote 7", &unwritten, &[wrote(2, 0, 0, 1), wrote(2, 0, 6, 7)]);
    // One trim cannot clear two values that were read after each other.
    let twice = [tried(1, 0, 0), wrote(2, 7, 1, 2), read(3, 0, 3, 4), wrote(2, 8, 5, 6), read(3, 0, 7, 8)];
    wrong("too few writes of zeroes", &twice, &[wrote(2, 0, 9, 10)]);
    legal(&[&twice[..], &[tried(1, 0, 0)]].concat());
    // Resurrected: the value is back after zeroes were read.
    wrong("the loss of zeroes", &[wrote(1, 7, 0, 1), read(2, 0, 4, 5), read(3, 7, 6, 7)], &[wrote(2, 0, 2, 6)]);
}

#[test]
fn blocks_are_on_their_own() {
    let on = |block, operation| Operation { block, ..operation };
    legal(&[on(1, wrote(1, 7, 0, 1)), on(2, wrote(1, 7, 2, 3)), on(2, read(2, 7, 4, 5)), on(1, read(2, 7, 6, 7))]);
    let violation = checked(&[1, 2, 3].map(|block| on(block, read(1, 9, 0, 1)))).expect_err("from nowhere");
    assert_eq!((violation.block, violation.others), (1, 2));
}

#[test]
#[should_panic(expected = "a value of its own")]
fn a_value_written_twice_is_the_tests_own_mistake() {
    let _ = checked(&[wrote(1, 7, 0, 1), tried(1, 7, 2)]);
}

#[test]
fn a_recorder_keeps_what_was_not_answered_apart() {
    let recorder = Recorder::new();
    let writing = recorder.start_write(1, BLOCK, 7);
    let reading = recorder.start_read(2, BLOCK);
    recorder.clone().finish_write(writing);
    recorder.finish_read(reading, 7);
    let _unanswered = (recorder.start_write(1, BLOCK, 8), recorder.start_read(2, BLOCK));
    let history = recorder.history();
    let [first, seen, second] = history.operations() else { panic!("{history:?}") };
    assert_eq!((first.value, second.value, second.end), (7, 8, None));
    assert!(first.start <= seen.start && first.latest() <= seen.latest() && seen.latest() <= second.start);
    assert_eq!(check(&history).map(|report| report.unknown).expect("legal"), 1);
}
