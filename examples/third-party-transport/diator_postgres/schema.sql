-- Everything that the transport keeps in a database. A broker creates it at its first connection. To create it before:
-- psql -c 'CREATE SCHEMA diator' -c 'SET search_path = diator' -f schema.sql

CREATE TABLE IF NOT EXISTS groups (
    topic text,
    grp text,
    expires timestamptz,  -- only of a subscription without a group: it is dropped if it gives no sign of life by then
    PRIMARY KEY (topic, grp)
);

-- One row for each group that receives a message, until the group has settled it.
CREATE TABLE IF NOT EXISTS messages (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic text NOT NULL,
    grp text,  -- null: no group was subscribed; the first group that subscribes takes it
    body bytea NOT NULL,
    headers json NOT NULL CHECK (json_typeof(headers) = 'object'),  -- jsonb cannot store \u0000
    attempt integer NOT NULL DEFAULT 0,
    due timestamptz NOT NULL DEFAULT '-infinity',  -- of a redelivery: the end of its delay, or of the lease
    holder uuid
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02);
CREATE INDEX IF NOT EXISTS messages_waiting ON messages (grp, due, id);

CREATE TABLE IF NOT EXISTS dead_letters (
    id bigint PRIMARY KEY,
    topic text NOT NULL,
    grp text NOT NULL,
    body bytea NOT NULL,
    headers json NOT NULL,  -- the message's own headers, and diator-dlq-…: the reason and the origin
    since timestamptz NOT NULL DEFAULT now()
);

-- Creating a group waits for the sends in progress, and a send waits while a group is created. So a new group receives
-- every message that is confirmed after the group exists. Each statement of a function sees what was committed before
-- that statement began; one plain statement would see a single, older snapshot.
CREATE OR REPLACE FUNCTION send(topics text[], bodies bytea[], all_headers text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    LOCK TABLE groups IN ROW SHARE MODE;
    INSERT INTO messages (topic, grp, body, headers)
        SELECT sent.topic, groups.grp, sent.body, sent.headers::json
        FROM unnest(topics, bodies, all_headers) WITH ORDINALITY AS sent (topic, body, headers, position)
        LEFT JOIN groups ON groups.topic = sent.topic AND coalesce(expires > now(), true)
        ORDER BY position;
    PERFORM pg_notify(current_schema, grp) FROM groups WHERE topic = ANY (topics) GROUP BY grp;
END $$;

-- Return whether the group existed. `expires_after` is null for a group that stays.
CREATE OR REPLACE FUNCTION join_group(name text, topics text[], expires_after interval) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    missing text[];
BEGIN
    PERFORM drop_groups(array_agg(DISTINCT grp)) FROM groups WHERE expires < now();
    missing := ARRAY(SELECT unnest(topics) EXCEPT SELECT topic FROM groups WHERE grp = name);
    IF missing = '{}' THEN
        UPDATE groups SET expires = now() + expires_after WHERE grp = name AND expires_after IS NOT NULL;
        RETURN true;
    END IF;
    LOCK TABLE groups IN EXCLUSIVE MODE;  -- so far the transaction has a read lock or this one: no deadlock
    INSERT INTO groups SELECT topic, name, now() + expires_after FROM unnest(missing) AS topic ON CONFLICT DO NOTHING;
    IF expires_after IS NULL THEN
        UPDATE messages SET grp = name WHERE grp IS NULL AND topic = ANY (missing);
    END IF;
    RETURN false;
END $$;

CREATE OR REPLACE FUNCTION drop_groups(names text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF names IS NOT NULL THEN
        DELETE FROM messages WHERE grp = ANY (names);  -- most of them now, while nobody has to wait
        LOCK TABLE groups IN EXCLUSIVE MODE;
        DELETE FROM groups WHERE grp = ANY (names);
        DELETE FROM messages WHERE grp = ANY (names);
    END IF;
END $$;
