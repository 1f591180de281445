//! What thalweg tells `tracing`, for Python's `logging`: the logger `thalweg`.
//!
//! thalweg says things with an endpoint's lock in hand, on any thread, with the GIL or without it.
//! So an event is made a text and put on a list, and nothing else; whoever is next in Python with no
//! lock in hand hands the list to `logging` (`Shared::settle`, as for buffers that are given back).
//! The list's own lock is never waited for, and nobody who holds it waits for anything.
//! What a handler raises is nobody's affair, unless it is to end the program (`KeyboardInterrupt`).
//!
//! Warnings and errors are always taken; what is said for information where the logger wants that,
//! which it is asked when a node is made, and when it listens, accepts or connects. Nothing below:
//! that would be told in the course of messages.

use std::collections::VecDeque;
use std::fmt::{self, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use pyo3::prelude::*;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::{Interest, Subscriber};
use tracing::{Event, Level, Metadata, level_filters::LevelFilter};

use crate::error;
use crate::used::used;

/// What waits to be handed over; more is counted and left out.
const WAITING_MAX: usize = 1024;
/// Of one event's text. What peers say may be in it.
const TEXT_MAX: usize = 2048;

/// The levels of Python's `logging`.
const ERROR: u8 = 40;
const WARNING: u8 = 30;
const INFO: u8 = 20;

struct Said {
    level: u8,
    text: String,
}

static WAITING: Mutex<VecDeque<Said>> = Mutex::new(VecDeque::new());
/// How many events are waiting, so that looking costs nothing.
static COUNT: AtomicUsize = AtomicUsize::new(0);
static LEFT_OUT: AtomicUsize = AtomicUsize::new(0);
static WANTS_INFO: AtomicBool = AtomicBool::new(false);

/// Takes what this library tells `tracing` from now on. Others' copies of `tracing` are not touched:
/// this one is linked into the module.
pub fn install() {
    // Fails where it was done before, in another interpreter of this process.
    let _ = tracing::subscriber::set_global_default(Bridge);
}

fn logger(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
    used(py).map(|used| used.logger.bind(py))
}

/// Asks the logger what it wants to hear. Fails with what is to end the program only.
pub fn ask(py: Python<'_>) -> PyResult<()> {
    let wants = logger(py)
        .and_then(|logger| logger.call_method1("isEnabledFor", (INFO,)))
        .and_then(|wants| wants.is_truthy());
    let wants = match wants {
        Err(error) if error::ends_program(py, &error) => return Err(error),
        wants => wants.unwrap_or(false),
    };
    WANTS_INFO.store(wants, Ordering::Relaxed);
    Ok(())
}

/// Hands over what there is. With no lock in hand: handlers are Python code. Gives what one of them
/// raised to end the program.
pub fn hand_over(py: Python<'_>) -> Option<PyErr> {
    if COUNT.load(Ordering::Relaxed) == 0 {
        return None;
    }
    // Held by another thread, or by one that a fork has left behind: the next time will do.
    let Ok(mut waiting) = WAITING.try_lock() else { return None };
    // Before `LEFT_OUT` is read: what is counted there later raises it again.
    COUNT.swap(0, Ordering::AcqRel);
    let said = std::mem::take(&mut *waiting);
    drop(waiting);
    let mut last_words = None;
    let left_out = LEFT_OUT.swap(0, Ordering::Relaxed);
    let note = (left_out > 0)
        .then(|| Said { level: WARNING, text: format!("{left_out} messages were left out") });
    for Said { level, text } in said.into_iter().chain(note) {
        let told = logger(py).and_then(|logger| logger.call_method1("log", (level, "%s", text)));
        match told {
            Err(error) if error::ends_program(py, &error) => {
                last_words.get_or_insert(error);
            }
            Err(error) => error.write_unraisable(py, None),
            Ok(_) => {}
        }
    }
    last_words
}

fn put(level: u8, text: String) {
    match WAITING.try_lock() {
        Ok(mut waiting) if waiting.len() < WAITING_MAX => {
            waiting.push_back(Said { level, text });
            COUNT.store(waiting.len(), Ordering::Relaxed);
        }
        _ => {
            LEFT_OUT.fetch_add(1, Ordering::Relaxed);
            // That something was left out is to be told, even where nothing else is.
            COUNT.fetch_max(1, Ordering::Release);
        }
    }
}

fn level_of(level: &Level) -> u8 {
    match *level {
        Level::ERROR => ERROR,
        Level::WARN => WARNING,
        _ => INFO,
    }
}

struct Bridge;

impl Subscriber for Bridge {
    fn register_callsite(&self, what: &'static Metadata<'static>) -> Interest {
        // Levels may change: asked each time.
        if *what.level() <= Level::INFO { Interest::sometimes() } else { Interest::never() }
    }

    fn enabled(&self, what: &Metadata<'_>) -> bool {
        let level = *what.level();
        level <= Level::WARN || (level == Level::INFO && WANTS_INFO.load(Ordering::Relaxed))
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::INFO)
    }

    // What is told of the peer is in the events; spans are for measuring.
    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        put(level_of(event.metadata().level()), text.into_line());
    }
}

/// An event in one line: what it says, then its fields.
#[derive(Default)]
struct Text {
    message: Line,
    fields: Line,
}

impl Text {
    fn into_line(self) -> String {
        let (mut line, fields) = (self.message.0, self.fields.0);
        if !fields.is_empty() {
            line.push_str(": ");
            line.push_str(&fields);
        }
        line
    }
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing into a line does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            "error" => write!(self.fields, "{}{value:?}", self.fields.separator()),
            name => write!(self.fields, "{}{name} {value:?}", self.fields.separator()),
        };
    }
}

/// A text as one line of bounded length, as in the log.
pub fn line(text: &str) -> String {
    let mut line = Line::default();
    // Writing into a line does not fail.
    let _ = line.write_str(text);
    line.0
}

/// Of bounded length, and without what would make another line of it or move a cursor.
#[derive(Default)]
struct Line(String);

impl Line {
    fn separator(&self) -> &'static str {
        if self.0.is_empty() { "" } else { ", " }
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for char in text.chars() {
            if self.0.len() >= TEXT_MAX {
                break;
            }
            match char.is_control() {
                true => self.0.extend(char.escape_default()),
                false => self.0.push(char),
            }
        }
        Ok(())
    }
}
