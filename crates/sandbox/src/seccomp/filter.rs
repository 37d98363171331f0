//! A compiler from tables of system calls to filter programs of the kernel.
//!
//! The kernel translates a filter anew for each sandbox and keeps it in several forms, so its
//! length costs start time and memory: one comparison per listed call makes about 1,800
//! instructions out of the tables of this crate, the binary search over ranges of neighbouring
//! calls below about 150.

use std::collections::BTreeMap;

use libc::sock_filter;

/// What happens to a call.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Answer {
    /// The kernel carries it out.
    Allow,
    /// The call returns this error number.
    Errno(u16),
    /// The process is killed by SIGSYS.
    Kill,
}

/// The answer to a call, which may depend on one argument.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rule {
    Always(Answer),
    /// Looks at the lower half of an argument. That is all of it for the arguments in question,
    /// which the kernel takes for 32-bit numbers.
    If {
        argument: u32,
        is: Test,
        then: Answer,
        otherwise: Answer,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Test {
    OneOf(&'static [u32]),
    AnyBitOf(u32),
}

#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xc000_00b7;

/// Offsets in `struct seccomp_data` (seccomp(2)).
const NR: u32 = 0;
const ARCH: u32 = 4;
const ARGS: u32 = 16;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const IF_ANY_BIT: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;

/// Compiles `rules`; calls without one get `otherwise`. Calls made through another architecture's
/// entry (32-bit calls of a 64-bit process) kill.
///
/// # Panics
/// If the program becomes so long that a jump does not reach; tests compile every table.
pub(super) fn compile(rules: &BTreeMap<u32, Rule>, otherwise: Answer) -> Vec<sock_filter> {
    let mut program = Program::default();
    program.load(ARCH);
    program.branch(IF_EQUAL, AUDIT_ARCH, Target::Next, Target::Answer(Answer::Kill));
    program.load(NR);
    program.search(&ranges(rules, Rule::Always(otherwise)));
    program.finish()
}

/// All system call numbers, divided into ranges of equal rules: first number and rule of each.
fn ranges(rules: &BTreeMap<u32, Rule>, otherwise: Rule) -> Vec<(u32, Rule)> {
    let mut all: Vec<(u32, Rule)> = Vec::new();
    let mut add = |first, rule| {
        if all.last().is_none_or(|(_, last)| *last != rule) {
            all.push((first, rule));
        }
    };
    let mut next = 0;
    for (nr, rule) in rules {
        if *nr > next {
            add(next, otherwise);
        }
        add(*nr, *rule);
        next = nr + 1;
    }
    add(next, otherwise);
    all
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Next,
    Label(usize),
    Answer(Answer),
}

enum Instruction {
    Load(u32),
    Branch { code: u16, value: u32, yes: Target, no: Target },
}

/// Instructions whose jumps are still to be resolved.
#[derive(Default)]
struct Program {
    instructions: Vec<Instruction>,
    /// Where each label is, as an instruction's index.
    labels: Vec<usize>,
    /// Rules that look at arguments, and the labels under which the search refers to them.
    tests: Vec<(usize, Rule)>,
}

impl Program {
    fn load(&mut self, offset: u32) {
        self.instructions.push(Instruction::Load(offset));
    }

    fn branch(&mut self, code: u16, value: u32, yes: Target, no: Target) {
        self.instructions.push(Instruction::Branch { code, value, yes, no });
    }

    fn label(&mut self) -> usize {
        self.labels.push(usize::MAX);
        self.labels.len() - 1
    }

    fn place(&mut self, label: usize) {
        self.labels[label] = self.instructions.len();
    }

    /// A binary search for the range that the loaded number is in.
    fn search(&mut self, ranges: &[(u32, Rule)]) {
        let (low, high) = ranges.split_at(ranges.len() / 2);
        let (Some((middle, _)), false) = (high.first(), low.is_empty()) else {
            // A table with a single range: any comparison will do.
            let only = self.outcome(ranges);
            return self.branch(IF_AT_LEAST, 0, only, only);
        };
        let yes = self.outcome(high);
        let no = if let [_] = low { self.outcome(low) } else { Target::Next };
        self.branch(IF_AT_LEAST, *middle, yes, no);
        if low.len() > 1 {
            self.search(low);
        }
        if let Target::Label(label) = yes
            && high.len() > 1
        {
            self.place(label);
            self.search(high);
        }
    }

    /// Where to go for one of `ranges`.
    fn outcome(&mut self, ranges: &[(u32, Rule)]) -> Target {
        match ranges {
            [(_, Rule::Always(answer))] => Target::Answer(*answer),
            [(_, rule)] => {
                let label = self.label();
                self.tests.push((label, *rule));
                Target::Label(label)
            }
            _ => Target::Label(self.label()),
        }
    }

    /// Adds the argument tests and the answers, and resolves all jumps.
    fn finish(mut self) -> Vec<sock_filter> {
        for (label, rule) in std::mem::take(&mut self.tests) {
            let Rule::If { argument, is, then, otherwise } = rule else { continue };
            self.place(label);
            self.load(ARGS + 8 * argument);
            let (then, otherwise) = (Target::Answer(then), Target::Answer(otherwise));
            match is {
                Test::AnyBitOf(mask) => self.branch(IF_ANY_BIT, mask, then, otherwise),
                Test::OneOf(values) => {
                    for (i, value) in values.iter().enumerate() {
                        let last = i + 1 == values.len();
                        let no = if last { otherwise } else { Target::Next };
                        self.branch(IF_EQUAL, *value, then, no);
                    }
                }
            }
        }
        let mut answers: Vec<Answer> = Vec::new();
        for instruction in &self.instructions {
            if let Instruction::Branch { yes, no, .. } = instruction {
                answers.extend([yes, no].iter().filter_map(|t| match t {
                    Target::Answer(answer) => Some(*answer),
                    _ => None,
                }));
            }
        }
        answers.sort_unstable();
        answers.dedup();
        let end = self.instructions.len();
        let distance = |from: usize, target: Target| {
            let to = match target {
                Target::Next => from + 1,
                Target::Label(label) => self.labels[label],
                Target::Answer(answer) => {
                    end + answers.binary_search(&answer).expect("collected above")
                }
            };
            u8::try_from(to - from - 1).expect("the filter is short enough for its jumps")
        };
        let mut out: Vec<sock_filter> = self
            .instructions
            .iter()
            .enumerate()
            .map(|(i, instruction)| match *instruction {
                Instruction::Load(offset) => sock_filter { code: LOAD, jt: 0, jf: 0, k: offset },
                Instruction::Branch { code, value, yes, no } => {
                    sock_filter { code, jt: distance(i, yes), jf: distance(i, no), k: value }
                }
            })
            .collect();
        out.extend(answers.iter().map(|answer| {
            let k = match answer {
                Answer::Allow => libc::SECCOMP_RET_ALLOW,
                Answer::Errno(errno) => libc::SECCOMP_RET_ERRNO | u32::from(*errno),
                Answer::Kill => libc::SECCOMP_RET_KILL_PROCESS,
            };
            sock_filter { code: RETURN, jt: 0, jf: 0, k }
        }));
        out
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::collection::btree_map;
    use proptest::prelude::*;

    use super::*;

    /// What the kernel would do with a call, by running the program as it does.
    pub fn answer(program: &[sock_filter], arch: u32, nr: u32, args: [u64; 6]) -> u32 {
        let mut accumulator = 0;
        let mut at = 0;
        loop {
            let i = &program[at];
            let jump = |yes: bool| usize::from(if yes { i.jt } else { i.jf });
            at += 1;
            match i.code {
                LOAD => {
                    accumulator = match i.k {
                        NR => nr,
                        ARCH => arch,
                        k => (args[((k - ARGS) / 8) as usize] >> (32 * ((k / 4) % 2))) as u32,
                    }
                }
                IF_EQUAL => at += jump(accumulator == i.k),
                IF_AT_LEAST => at += jump(accumulator >= i.k),
                IF_ANY_BIT => at += jump(accumulator & i.k != 0),
                RETURN => return i.k,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    pub fn native(program: &[sock_filter], nr: u32, args: [u64; 6]) -> u32 {
        answer(program, AUDIT_ARCH, nr, args)
    }

    fn expected(rule: Rule, args: [u64; 6]) -> u32 {
        let answer = match rule {
            Rule::Always(answer) => answer,
            Rule::If { argument, is, then, otherwise } => {
                let value = args[argument as usize] as u32;
                let met = match is {
                    Test::OneOf(values) => values.contains(&value),
                    Test::AnyBitOf(mask) => value & mask != 0,
                };
                if met { then } else { otherwise }
            }
        };
        match answer {
            Answer::Allow => libc::SECCOMP_RET_ALLOW,
            Answer::Errno(e) => libc::SECCOMP_RET_ERRNO | u32::from(e),
            Answer::Kill => libc::SECCOMP_RET_KILL_PROCESS,
        }
    }

    fn answers() -> impl Strategy<Value = Answer> {
        prop_oneof![
            Just(Answer::Allow),
            Just(Answer::Errno(1)),
            Just(Answer::Errno(38)),
            Just(Answer::Kill)
        ]
    }

    fn rules() -> impl Strategy<Value = Rule> {
        let tests = prop_oneof![
            Just(Test::OneOf(&[3])),
            Just(Test::OneOf(&[0, 7, u32::MAX])),
            Just(Test::AnyBitOf(0x81)),
        ];
        prop_oneof![
            8 => answers().prop_map(Rule::Always),
            1 => (0..6u32, tests, answers(), answers()).prop_map(
                |(argument, is, then, otherwise)| Rule::If { argument, is, then, otherwise }
            ),
        ]
    }

    proptest! {
        #[test]
        fn programs_do_what_the_table_says(
            table in btree_map(0..200u32, rules(), 0..60),
            otherwise in answers(),
            args in any::<[u8; 6]>(),
        ) {
            let program = compile(&table, otherwise);
            for nr in (0..210).chain([1 << 30, u32::MAX]) {
                let rule = table.get(&nr).copied().unwrap_or(Rule::Always(otherwise));
                for args in [args.map(u64::from), [7; 6], [0xffff_ffff_0000_0003; 6]] {
                    prop_assert_eq!(native(&program, nr, args), expected(rule, args));
                }
                prop_assert_eq!(
                    answer(&program, 0x4000_0003, nr, [0; 6]),
                    libc::SECCOMP_RET_KILL_PROCESS
                );
            }
        }
    }
}
