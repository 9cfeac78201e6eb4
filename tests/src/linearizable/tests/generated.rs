//! Generated histories: of a block that works, and of nothing in particular.

use super::*;
use crate::random::Random;
use crate::rounds;
use std::time::Instant;

/// Whether there is an order, found by trying all of them.
fn has_order(operations: &[Operation]) -> bool {
    let mut tried = BTreeSet::new();
    goes_on(operations, 0, ZEROES, &mut tried)
}

fn goes_on(operations: &[Operation], done: u32, value: u64, tried: &mut BTreeSet<(u32, u64)>) -> bool {
    let left = || (0..operations.len()).filter(move |index| done & 1 << index == 0);
    if left().all(|index| operations[index].end.is_none()) {
        return true;
    }
    if !tried.insert((done, value)) {
        return false;
    }
    left().any(|index| {
        let next = &operations[index];
        let may_be_next = !left().any(|other| operations[other].precedes(next));
        let fits = next.is(Kind::Write) || next.value == value;
        may_be_next && fits && goes_on(operations, done | 1 << index, next.value, tried)
    })
}

fn text(operations: &[Operation]) -> String {
    operations.iter().map(|operation| format!("\n  {operation}")).collect()
}

/// How a history is made.
#[derive(Clone, Copy)]
struct Shape {
    block: u64,
    operations: u64,
    /// They have one operation each under way at a time.
    clients: u64,
    writes_percent: u64,
    /// Of the writes.
    zeroes_percent: u64,
    /// Of the writes; they come late or never.
    unknown_percent: u64,
    /// Longest time from an operation's start to its end.
    longest: u64,
}

/// What clients see of a block that works: every operation has a moment at which it takes effect.
fn true_history(random: &mut Random, shape: Shape) -> Vec<Operation> {
    let mut clocks = vec![0; shape.clients as usize];
    let mut planned = Vec::new();
    for value in 1..=shape.operations {
        let client = random.below(shape.clients);
        let clock = &mut clocks[client as usize];
        let start = *clock + random.below(3);
        let end = start + random.below(shape.longest);
        *clock = end;
        let write = random.chance(shape.writes_percent);
        let unknown = write && random.chance(shape.unknown_percent);
        let moment = match unknown {
            false => Some(random.between(start, end)),
            true if random.chance(30) => None,
            true => Some(start + random.below(shape.longest * 10)),
        };
        let kind = if write { Kind::Write } else { Kind::Read };
        let value = if random.chance(shape.zeroes_percent) { ZEROES } else { value };
        let end = (!unknown).then_some(end);
        planned.push((moment, Operation { client, block: shape.block, kind, value, start, end }));
    }
    planned.sort_by_key(|(moment, _)| *moment);
    let mut held = ZEROES;
    for (_, operation) in planned.iter_mut().filter(|(moment, _)| moment.is_some()) {
        match operation.kind {
            Kind::Write => held = operation.value,
            Kind::Read => operation.value = held,
        }
    }
    planned.into_iter().map(|(_, operation)| operation).collect()
}

fn small(random: &mut Random, most: u64) -> Shape {
    Shape {
        block: 0,
        operations: random.between(most / 2, most),
        clients: random.between(1, 4),
        writes_percent: random.between(30, 60),
        zeroes_percent: random.below(70),
        unknown_percent: random.below(30),
        longest: random.between(1, 8),
    }
}

/// Lets some reads return zeroes, or another of the values at hand.
fn confuse(random: &mut Random, operations: &mut [Operation]) {
    let mut values = vec![ZEROES];
    if random.chance(50) {
        values.extend(operations.iter().map(|operation| operation.value));
    }
    for operation in operations.iter_mut().filter(|operation| operation.is(Kind::Read)) {
        if random.chance(60) {
            operation.value = values[random.below(values.len() as u64) as usize];
        }
    }
}

/// Values and zeroes that replace each other again and again, with many ways to tell which writes of zeroes were seen.
fn blinking(random: &mut Random) -> Vec<Operation> {
    let mut operations = Vec::new();
    for _ in 0..random.between(2, 4) {
        let value = operations.len() as u64 + 1;
        let start = random.below(30);
        operations.push(wrote(1, value, start, start + random.below(8)));
        if random.chance(30) {
            let again = start + random.below(8);
            operations.push(read(2, value, again, again + random.below(4)));
        }
    }
    for _ in 0..random.between(2, 4) {
        let start = random.below(30);
        operations.push(read(3, ZEROES, start, start + random.below(6)));
    }
    for _ in 0..random.between(1, 4) {
        let start = random.below(30);
        let end = (!random.chance(20)).then(|| start + random.below(20));
        operations.push(Operation { end, ..tried(4, ZEROES, start) });
    }
    operations
}

/// True histories, most of them changed.
fn confused(random: &mut Random, most: u64) -> Vec<Operation> {
    let shape = small(random, most);
    let mut operations = true_history(random, shape);
    if random.chance(85) {
        confuse(random, &mut operations);
    } else {
        assert!(has_order(&operations), "the generator is wrong: {}", text(&operations));
    }
    operations
}

fn agrees_with_all_orders(histories: u64, generate: impl Fn(&mut Random) -> Vec<Operation>) {
    let mut random = Random::of_test();
    let mut seen = [0, 0];
    let mut zeroes = 0;
    for _ in 0..histories {
        let operations = generate(&mut random);
        let expected = has_order(&operations);
        let verdict = checked(&operations);
        assert_eq!(verdict.is_ok(), expected, "{verdict:?}: {}", text(&operations));
        if let Err(violation) = verdict {
            zeroes += u64::from(violation.what.contains("too few writes of zeroes"));
            is_proven(&violation, &operations);
        }
        seen[usize::from(expected)] += 1;
    }
    println!("{} histories without an order ({zeroes} lack zeroes), {} with one", seen[0], seen[1]);
    assert!(seen.iter().all(|count| *count > histories / 10), "one-sided: {seen:?}");
}

/// The operations it names have no order; nor do they have one if all writes of zeroes are added that it leaves out.
fn is_proven(violation: &Violation, operations: &[Operation]) {
    let told = &violation.operations;
    assert!(!has_order(told), "no contradiction: {violation} of {}", text(operations));
    let of_zeroes = |other: &Operation| other.is(Kind::Write) && other.value == ZEROES;
    let with_zeroes: Vec<Operation> =
        operations.iter().filter(|other| of_zeroes(other) || told.contains(other)).copied().collect();
    assert!(!has_order(&with_zeroes), "incomplete: {violation} of {}", text(operations));
}

#[test]
fn agrees_with_a_search_through_all_orders() {
    agrees_with_all_orders(rounds(20_000), |random| confused(random, 7));
    agrees_with_all_orders(rounds(20_000), |random| confused(random, 14));
    agrees_with_all_orders(rounds(20_000), blinking);
}

/// 16 at a time; some 50 writes of 390 operations are not answered.
fn large(block: u64, operations: u64) -> Shape {
    Shape { block, operations, clients: 16, writes_percent: 50, zeroes_percent: 10, unknown_percent: 25, longest: 100 }
}

#[test]
fn a_hundred_thousand_operations_of_working_blocks_are_legal() {
    for (blocks, each) in [(256, 390), (1, 100_000)] {
        let mut random = Random::of_test();
        let operations: Vec<Operation> =
            (0..blocks).flat_map(|block| true_history(&mut random, large(block, each))).collect();
        let began = Instant::now();
        let report = checked(&operations).unwrap_or_else(|violation| panic!("{violation}"));
        println!("{} operations: {:?}, {report:?}", operations.len(), began.elapsed());
        assert!(report.appeared > 0 && report.zeroes > 0);
    }
}

/// Lets one read return a value that another one had replaced before; `None`: there is no such read.
fn outdate(random: &mut Random, operations: &mut [Operation]) -> Option<Operation> {
    let acknowledged: Vec<Operation> = operations
        .iter()
        .filter(|write| write.is(Kind::Write) && write.end.is_some() && write.value != ZEROES)
        .copied()
        .collect();
    let middle = acknowledged[random.below(acknowledged.len() as u64) as usize];
    let older = acknowledged.iter().rev().find(|older| older.precedes(&middle))?;
    let read = operations.iter_mut().find(|read| read.is(Kind::Read) && middle.precedes(read))?;
    read.value = older.value;
    Some(*read)
}

#[test]
fn one_stale_read_among_many_operations_is_found_and_told_briefly() {
    let mut random = Random::of_test();
    let mut found = 0;
    for _ in 0..rounds(200) {
        let mut operations = true_history(&mut random, large(0, 390));
        let Some(stale) = outdate(&mut random, &mut operations) else { continue };
        let violation = checked(&operations).expect_err("a stale read");
        assert!(violation.operations.contains(&stale), "{violation}");
        assert!(violation.operations.len() <= 6, "{violation}");
        found += 1;
    }
    assert!(found > 100, "{found} histories had a read to change");
}

#[test]
fn a_stale_read_among_a_hundred_thousand_operations_on_one_block_is_told_soon() {
    let mut random = Random::of_test();
    let mut operations = true_history(&mut random, large(0, 100_000));
    let stale = (0..100).find_map(|_| outdate(&mut random, &mut operations)).expect("some read to change");
    let began = Instant::now();
    let violation = checked(&operations).expect_err("a stale read");
    println!("{:?} for {violation}", began.elapsed());
    assert!(violation.operations.contains(&stale));
}
