//! Tables of the system calls that a thread may make, and the programs that they become. Pure.
//!
//! A program finds the number of a call by halving, not by going through all that there are: the kernel takes a quarter of the time
//! to take it in, which each start of a process waits for.

use crate::Instruction;
use seccompiler::{BpfProgram, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};
use std::collections::BTreeMap;

/// A system call, and with which arguments it may be made.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    call: i64,
    answer: Answer,
}

/// What a thread is told that makes a call.
#[derive(Clone, Copy, Debug)]
enum Answer {
    /// What the call returns, if the arguments are as one of the cases says, or if there are no cases.
    Made(&'static [Case]),
    /// This error.
    Refused(i32),
}

/// What must hold of the arguments, all of it.
pub type Case = &'static [Check];

/// What must hold of one argument.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    argument: u8,
    mask: u64,
    value: u64,
}

/// A call with any arguments.
pub const fn always(call: i64) -> Rule {
    Rule { call, answer: Answer::Made(&[]) }
}

/// A call whose arguments are as one of the cases says.
pub const fn when(call: i64, cases: &'static [Case]) -> Rule {
    Rule { call, answer: Answer::Made(cases) }
}

/// A call that is answered with this error, instead of ending the process: the C library tries it, and knows what to do without.
pub const fn refused(call: i64, error: i32) -> Rule {
    Rule { call, answer: Answer::Refused(error) }
}

/// The low half of an argument has this value. It is all that the kernel looks at where it takes an `int`.
pub const fn is(argument: u8, value: u32) -> Check {
    Check { argument, mask: u32::MAX as u64, value: value as u64 }
}

/// An argument has these bits of the mask, and no others of it.
pub const fn bits(argument: u8, mask: u64, value: u64) -> Check {
    Check { argument, mask, value }
}

/// An argument has none of these bits.
pub const fn without(argument: u8, mask: u64) -> Check {
    bits(argument, mask, 0)
}

/// What becomes of a call that may not be made: the thread is told, by SIGSYS.
const TRAP: u32 = libc::SECCOMP_RET_TRAP;
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

/// Where the kernel puts what is asked, in its `seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// Of calls as 64-bit programs of this architecture make them.
const X86_64: u32 = 0xc000_003e;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const UNLESS_BELOW: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;

/// A table that no program can be made of.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// A number that no system call has.
    #[error("{0} is no system call")]
    NoCall(i64),
    /// A check that cannot be made.
    #[error("system call {call}: {source}")]
    Check {
        /// The call.
        call: i64,
        /// What is wrong.
        source: seccompiler::BackendError,
    },
}

/// What the rules of one call come to.
#[derive(Default)]
struct Verdict {
    always: bool,
    cases: Vec<Case>,
    refused: Option<i32>,
}

/// The program for a thread that may make the calls of these groups. A call that several have rules for may be made if any of
/// them says so.
pub fn compile(groups: &[&[Rule]]) -> Result<Vec<Instruction>, TableError> {
    let mut verdicts = BTreeMap::<u32, Verdict>::new();
    for rule in groups.iter().copied().flatten() {
        let number = u32::try_from(rule.call).map_err(|_| TableError::NoCall(rule.call))?;
        let verdict = verdicts.entry(number).or_default();
        match rule.answer {
            Answer::Made([]) => verdict.always = true,
            Answer::Made(cases) => verdict.cases.extend(cases),
            Answer::Refused(error) => verdict.refused = Some(error),
        }
    }
    let mut leaves = BTreeMap::from([(0, returning(TRAP))]);
    for (number, verdict) in verdicts {
        leaves.insert(number, decide(number, &verdict)?);
        leaves.entry(number + 1).or_insert_with(|| returning(TRAP));
    }
    let mut leaves: Vec<_> = leaves.into_iter().collect();
    leaves.dedup_by(|next, before| next.1 == before.1);
    let mut program = vec![load(ARCHITECTURE), jump_if(IF_EQUAL, X86_64, 1, 0)];
    program.extend(returning(TRAP));
    program.push(load(NUMBER));
    program.extend(search(&leaves));
    Ok(program)
}

/// What is to be done once the number is known: looks at the arguments, case by case, if it has to.
fn decide(number: u32, verdict: &Verdict) -> Result<Vec<Instruction>, TableError> {
    if verdict.always {
        return Ok(returning(ALLOW));
    }
    let fail = |source| TableError::Check { call: number.into(), source };
    let mut program = Vec::new();
    for case in &verdict.cases {
        let conditions = case.iter().map(condition).collect::<Result<_, _>>().map_err(fail)?;
        program.extend(BpfProgram::from(SeccompRule::new(conditions).map_err(fail)?));
        program.extend(returning(ALLOW));
    }
    program.extend(returning(verdict.refused.map_or(TRAP, |error| libc::SECCOMP_RET_ERRNO | error as u32)));
    Ok(program)
}

fn condition(check: &Check) -> Result<SeccompCondition, seccompiler::BackendError> {
    let half = u64::from(u32::MAX);
    let (width, operator) = match check.mask {
        mask if mask == half => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq),
        mask if mask < half => (SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask)),
        mask => (SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(mask)),
    };
    SeccompCondition::new(check.argument, width, operator, check.value)
}

/// Most leaves that share their ends: jumps to there reach 255 instructions.
const MOST_SHARING: usize = 128;

/// Goes on at the last leaf whose number is not above the one that was asked for.
fn search(leaves: &[(u32, Vec<Instruction>)]) -> Vec<Instruction> {
    if let [(_, only)] = leaves {
        return only.clone();
    }
    if let Some(program) = search_simple(leaves) {
        return program;
    }
    let (below, from) = leaves.split_at(leaves.len() / 2);
    let first = from.first().map_or(u32::MAX, |leaf| leaf.0);
    let (below, from) = (search(below), search(from));
    let mut program = match u8::try_from(below.len()) {
        Ok(length) => vec![jump_if(UNLESS_BELOW, first, length, 0)],
        Err(_) => vec![jump_if(UNLESS_BELOW, first, 0, 1), jump(below.len() as u32)],
    };
    program.extend(below);
    program.extend(from);
    program
}

/// As [`search`], where all leaves do nothing but allow, or trap: one allows for all of them, and one traps. That is half as long.
fn search_simple(leaves: &[(u32, Vec<Instruction>)]) -> Option<Vec<Instruction>> {
    let (allow, trap) = (returning(ALLOW), returning(TRAP));
    let is_simple = |leaf: &(u32, Vec<Instruction>)| leaf.1 == allow || leaf.1 == trap;
    if leaves.len() > MOST_SHARING || !leaves.iter().all(is_simple) {
        return None;
    }
    let simple: Vec<_> = leaves.iter().map(|(first, program)| (*first, usize::from(*program == trap))).collect();
    let mut program = comparisons(&simple, 0);
    program.extend(allow);
    program.extend(trap);
    Some(program)
}

/// The comparisons that lead to one of two ends, which come `after` so many more instructions: to the first or the second.
fn comparisons(leaves: &[(u32, usize)], after: usize) -> Vec<Instruction> {
    let (below, from) = leaves.split_at(leaves.len() / 2);
    let Some((first, _)) = from.first().filter(|_| !below.is_empty()) else { return Vec::new() };
    let above = comparisons(from, after);
    let under = comparisons(below, above.len() + after);
    // A single leaf is no comparison, but the way to its end.
    let over = |side: &[(u32, usize)], start: usize| match side {
        [(_, end)] => under.len() + above.len() + after + end,
        _ => start,
    };
    // There are at most MOST_SHARING comparisons to jump over, so that no jump is too long.
    let (jt, jf) = (over(from, under.len()) as u8, over(below, 0) as u8);
    let mut program = vec![jump_if(UNLESS_BELOW, *first, jt, jf)];
    program.extend(under);
    program.extend(above);
    program
}

fn jump(over: u32) -> Instruction {
    Instruction { code: JUMP, jt: 0, jf: 0, k: over }
}

fn load(from: u32) -> Instruction {
    Instruction { code: LOAD, jt: 0, jf: 0, k: from }
}

fn jump_if(code: u16, value: u32, jt: u8, jf: u8) -> Instruction {
    Instruction { code, jt, jf, k: value }
}

fn returning(what: u32) -> Vec<Instruction> {
    vec![Instruction { code: RETURN, jt: 0, jf: 0, k: what }]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the kernel would make of a program, for the few instructions that there are in ours.
    fn run(program: &[Instruction], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let mut data = vec![number, architecture, 0, 0];
        data.extend(arguments.iter().flat_map(|argument| [*argument as u32, (argument >> 32) as u32]));
        let (mut at, mut a) = (0, 0);
        loop {
            let Instruction { code, jt, jf, k } = program[at];
            at += 1;
            let jump = |holds: bool| usize::from(if holds { jt } else { jf });
            match code {
                LOAD => a = data[k as usize / 4],
                RETURN => return k,
                JUMP => at += k as usize,
                IF_EQUAL => at += jump(a == k),
                UNLESS_BELOW => at += jump(a >= k),
                0x54 => a &= k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    const RULES: &[Rule] = &[
        always(0),
        when(0, &[&[is(1, 5)]]),
        when(0, &[&[without(2, 4)], &[is(0, 9)]]),
        when(0, &[&[bits(0, 0x1_0000_00ff, 0x1_0000_0001), is(1, 7)]]),
        refused(0, libc::EACCES),
    ];

    fn rule() -> impl Strategy<Value = Rule> {
        (0i64..460, prop::sample::select(RULES)).prop_map(|(call, rule)| Rule { call, ..rule })
    }

    fn holds(case: Case, arguments: &[u64; 6]) -> bool {
        case.iter().all(|check| arguments[check.argument as usize] & check.mask == check.value)
    }

    proptest! {
        #[test]
        fn a_program_allows_what_its_tables_do_and_nothing_else(
            rules in prop::collection::vec(rule(), 0..300),
            asked in prop::collection::vec((0u32..500, prop::array::uniform6(0u64..12), any::<bool>()), 50),
        ) {
            let (one, other) = rules.split_at(rules.len() / 2);
            let program = compile(&[one, other]).unwrap();
            prop_assert!(program.len() < 4096, "the kernel takes no more");
            for (number, mut arguments, high) in asked {
                arguments[0] |= u64::from(high) << 32;
                let answers = || rules.iter().filter(|rule| rule.call == number.into()).map(|rule| rule.answer);
                let may = answers().any(|answer| match answer {
                    Answer::Made(cases) => cases.is_empty() || cases.iter().any(|case| holds(case, &arguments)),
                    Answer::Refused(_) => false,
                });
                let is_refused = answers().any(|answer| matches!(answer, Answer::Refused(_)));
                let expected = match is_refused {
                    _ if may => ALLOW,
                    true => 0x5_0000 | libc::EACCES as u32,
                    false => TRAP,
                };
                prop_assert_eq!(run(&program, X86_64, number, arguments), expected, "{} {:?}", number, arguments);
                prop_assert_eq!(run(&program, 0x4000_0003, number, arguments), TRAP, "a call of a 32-bit program");
                prop_assert_eq!(run(&program, X86_64, number | 0x4000_0000, arguments), TRAP, "one of the x32 interface");
            }
        }
    }

    const SEVENTH: Rule = when(1, &[&[is(6, 0)]]);

    #[test]
    fn a_table_with_a_call_that_is_none_is_refused() {
        assert!(matches!(compile(&[&[always(-1)]]), Err(TableError::NoCall(-1))));
        assert!(matches!(compile(&[&[SEVENTH]]), Err(TableError::Check { call: 1, .. })));
    }
}
