//! What the library tells about itself as it goes: spans of handshakes and endpoints, and events
//! inside of them; and nothing for a message.

use std::cell::RefCell;
use std::fmt::{Debug, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use thalweg::{CloseReason, ErrorKind, LinkKind, Message, MockPlan, MockSwitch, Node};
use thalweg_tests::{Way, pair_with, run_once, until, within};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// A span as it was seen.
#[derive(Clone, Debug)]
struct Seen {
    name: &'static str,
    level: Level,
    fields: String,
    handles: usize,
}

/// An event, and the spans around it.
#[derive(Clone, Debug)]
struct Said {
    text: String,
    inside: Vec<u64>,
}

#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<(Vec<Seen>, Vec<Said>)>>);

thread_local! {
    static INSIDE: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        write!(self.0, "{}={value:?} ", field.name()).expect("memory");
    }
}

impl Recorder {
    /// Spans of this name whose fields contain `what`.
    fn spans(&self, name: &str, what: &str) -> Vec<(u64, Seen)> {
        let all = self.0.lock().expect("no panic").0.clone();
        let numbered = all.into_iter().enumerate().map(|(at, seen)| (at as u64 + 1, seen));
        numbered.filter(|(_, seen)| seen.name == name && seen.fields.contains(what)).collect()
    }

    fn open(&self, name: &str, what: &str) -> usize {
        self.spans(name, what).iter().filter(|(_, seen)| seen.handles > 0).count()
    }

    /// Events inside this span.
    fn said_in(&self, span: u64) -> Vec<String> {
        let all = self.0.lock().expect("no panic").1.clone();
        all.into_iter().filter(|s| s.inside.contains(&span)).map(|said| said.text).collect()
    }

    fn counts(&self) -> (usize, usize) {
        let (spans, events) = &*self.0.lock().expect("no panic");
        (spans.len(), events.len())
    }
}

impl Subscriber for Recorder {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("thalweg")
    }

    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let mut text = Text(String::new());
        attributes.record(&mut text);
        let (name, level) = (attributes.metadata().name(), *attributes.metadata().level());
        let spans = &mut self.0.lock().expect("no panic").0;
        spans.push(Seen { name, level, fields: text.0, handles: 1 });
        Id::from_u64(spans.len() as u64)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        let inside = INSIDE.with_borrow(Clone::clone);
        self.0.lock().expect("no panic").1.push(Said { text: text.0, inside });
    }

    fn enter(&self, span: &Id) {
        INSIDE.with_borrow_mut(|inside| inside.push(span.into_u64()));
    }

    fn exit(&self, span: &Id) {
        INSIDE.with_borrow_mut(|inside| {
            assert_eq!(inside.pop(), Some(span.into_u64()), "spans are left in order");
        });
    }

    fn clone_span(&self, id: &Id) -> Id {
        self.0.lock().expect("no panic").0[id.into_u64() as usize - 1].handles += 1;
        id.clone()
    }

    fn try_close(&self, id: Id) -> bool {
        let seen = &mut self.0.lock().expect("no panic").0[id.into_u64() as usize - 1];
        seen.handles -= 1;
        seen.handles == 0
    }
}

/// One test, because the recorder is the whole process's.
#[test]
fn spans_tell_of_handshakes_and_endpoints() {
    let recorder = Recorder::default();
    tracing::subscriber::set_global_default(recorder.clone()).expect("the only one");
    run_once("spans", async {
        for way in [Way::Tcp, Way::ShmAll] {
            lifetime(&recorder, way).await;
        }
        a_failure(&recorder).await;
        a_refusal(&recorder).await;
    });
}

async fn lifetime(recorder: &Recorder, way: Way) {
    let earlier = recorder.spans("accept", "").len();
    let pair = pair_with(way, |config| config).await;
    let here = pair.listener.address().to_string();
    let connects = recorder.spans("connect", &here);
    let [(connect, seen)] = &connects[..] else { panic!("{connects:?}") };
    assert_eq!((seen.level, seen.handles), (Level::INFO, 0), "over with the handshake");
    let up = recorder.said_in(*connect);
    assert!(up.iter().any(|text| text.contains("endpoint up")), "{up:?}");
    let accepts = recorder.spans("accept", "");
    let (accept, seen) = &accepts[earlier];
    assert_eq!((seen.level, seen.handles), (Level::INFO, 0));
    assert!(recorder.said_in(*accept).iter().any(|text| text.contains("endpoint up")));
    let there = pair.b.peer().address.clone();
    assert!(seen.fields.contains(&there), "{seen:?}");
    // Each end has a span for as long as it lives; the messages have none.
    assert_eq!((recorder.open("endpoint", &here), recorder.open("endpoint", &there)), (1, 1));
    let (endpoint, seen) = recorder.spans("endpoint", &here).remove(0);
    assert_eq!(seen.level, Level::DEBUG);
    assert!(seen.fields.contains(way.link().name()), "{seen:?}");
    let before = recorder.counts();
    for _ in 0..1000 {
        pair.a.send(Message::copy_from_slice(b"no span")).await.expect("sending");
        pair.b.recv().await.expect("receiving");
    }
    assert_eq!(recorder.counts(), before, "a message costs no span and no event");
    pair.a.close(CloseReason::new(1, "told")).await.expect("closing");
    within(Duration::from_secs(10), "the end", pair.b.closed()).await;
    until("the spans to end", || {
        recorder.open("endpoint", &here) + recorder.open("endpoint", &there) == 0
    })
    .await;
    let (endpoint_there, _) = recorder.spans("endpoint", &there).remove(0);
    for span in [endpoint, endpoint_there] {
        let said = recorder.said_in(span);
        assert!(said.iter().any(|text| text.contains("endpoint closed")), "{said:?}");
    }
}

/// The end of an endpoint that fails is told inside its span, with the reason.
async fn a_failure(recorder: &Recorder) {
    let switch = MockSwitch::new();
    let plan = || MockPlan::new().switch(&switch);
    let pair = pair_with(Way::Mock, |config| config.mock(plan())).await;
    let here = pair.listener.address().to_string();
    let (span, _) = recorder.spans("endpoint", &here).remove(0);
    switch.break_links();
    assert_eq!(pair.a.closed().await.kind(), ErrorKind::ConnectionLost);
    let said = recorder.said_in(span);
    assert!(said.iter().any(|text| text.contains("endpoint failed")), "{said:?}");
    until("the span to end", || recorder.open("endpoint", &here) == 0).await;
}

/// A handshake that fails ends its span, and a link that does not come up is told inside of it.
async fn a_refusal(recorder: &Recorder) {
    let node = |transports: &[LinkKind]| {
        let switch = MockSwitch::new();
        switch.refuse(true);
        let plan = MockPlan::new().switch(&switch);
        let config = Way::Mock.config().transports(transports.iter().copied()).mock(plan);
        Node::new(config).expect("a node")
    };
    let there = node(&[LinkKind::Mock]);
    let listener = there.listen("thalweg://127.0.0.1:0").await.expect("listening");
    let error = node(&[LinkKind::Mock]).connect(listener.address()).await.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::NoRoute);
    let (span, _) = recorder.spans("connect", &listener.address().to_string()).remove(0);
    let said = recorder.said_in(span);
    assert!(said.iter().any(|text| text.contains("link not up")), "{said:?}");
    until("all handshakes to end", || {
        recorder.open("connect", "") + recorder.open("accept", "") == 0
    })
    .await;
}
